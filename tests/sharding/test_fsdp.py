"""FSDP2 in 2 and 4 processes is one process: KL, gradients, draws, training, Laplace, and what is saved."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bayeformers
from tests.sharding import worker
from tests.training import steps

ROOT = Path(__file__).parents[2]
TIMES = ("runtime", "per_second", "preparation_time")


def launched(folder: Path, what: str, processes: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               "-m", "tests.sharding.worker", str(folder), what]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("two"), "quick", 2)


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("several"), "full", request.param)


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def check_described(found: dict[str, Any], expected: dict[str, Any], gradient: float = 1e-5) -> None:
    """Gradients in the norm over all tensors: some, as that of a key's bias, are 0 but for rounding."""
    assert_bit_equal(found["state"], expected["state"])
    for name in ("kl", "kl again"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-6)
    for one, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert steps.relative_error(one, other) < gradient
    assert found["deterministic"] == expected["deterministic"]
    assert found["dtypes"] == {"torch.float32"}


def check_trained(found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """By plain gradient descent: Adam's first steps make a rounding error of a gradient near 0 as large as any."""
    for one, other in zip(found["gradients"], expected["gradients"], strict=True):
        assert steps.relative_error(one, other) < 1e-5
    assert_bit_equal(found["resumed"], found["state"])
    for name, value in expected["metrics"].items():
        if not name.endswith(TIMES):
            assert found["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for one, other in zip(found["logs"], expected["logs"], strict=True):
        for name in ("loss", "nll", "kl", "log_prior", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    saved = load_file(folder / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], found["state"][name]) for name in saved)
    loaded = bayeformers.from_pretrained(folder / "saved").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in found["state"].items())


def test_two_processes_are_one(two: dict[str, Any]) -> None:
    expected = worker.described("single", "alone", False)
    check_described(two["described"], expected)
    assert torch.equal(two["described"]["log_probs"], expected["log_probs"])  # the same draws, bit by bit


def test_training_saving_and_resuming(two: dict[str, Any], tmp_path: Path) -> None:
    check_trained(two["trained"], worker.trained(tmp_path, "single", "alone"), two["folder"] / "trained")
    configs = [json.loads((f / "saved" / "config.json").read_text()) for f in (two["folder"] / "trained", tmp_path)]
    assert configs[0] == configs[1]
    names = [{p.name for p in (f / "saved").iterdir()} for f in (two["folder"] / "trained", tmp_path)]
    assert names[0] == names[1]


def test_what_is_refused(two: dict[str, Any]) -> None:
    said = two["refusals"]
    assert said["cast"].startswith("RuntimeError: The scale of")
    assert "separate_scales(model)" in said["cast"]
    assert said["late"].startswith("RuntimeError: '0.weight' is split among processes inside the forward. Tensor and")
    assert "shard it by FSDP2 (`fully_shard`)" in said["split"]


@pytest.mark.slow
@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: "-".join(map(str, case)))
def test_converted_before_and_after(case: tuple[str, str, bool], several: dict[str, Any]) -> None:
    found, expected = several["described"][case], worker.described(case[0], "alone", case[2])
    check_described(found, expected)
    assert torch.equal(found["log_probs"], expected["log_probs"])


@pytest.mark.slow
@pytest.mark.parametrize("prior", sorted(worker.PRIORS))
def test_priors(prior: str, several: dict[str, Any]) -> None:
    check_described(several["priors"][prior], worker.described("single", "alone", False, prior))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after"])
def test_mixed_precision(how: str, several: dict[str, Any]) -> None:
    """Against float32: products of bfloat16 numbers have errors of 2^-8, in two layers and their gradients."""
    expected = worker.described("single", "alone", False)
    check_described(several["bf16"][how], expected, gradient=8 * 2**-8)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "accumulation"), [("single", 2), ("causal", 1)])
def test_training(kind: str, accumulation: int, several: dict[str, Any], tmp_path: Path) -> None:
    expected = worker.trained(tmp_path, kind, "alone", accumulation)
    check_trained(several["trained"][kind, accumulation], expected, several["folder"] / f"{kind}{accumulation}")


@pytest.mark.slow
def test_laplace(several: dict[str, Any], tmp_path: Path) -> None:
    found, expected = several["fitted"], worker.fitted(tmp_path, "alone")
    assert found["evidence"] == pytest.approx(expected["evidence"], rel=1e-6)
    for method in ("glm", "sample"):
        for name, value in expected[method].items():
            if not name.endswith(TIMES):
                assert found[method][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    one, other = (load_file(folder / "model.safetensors") for folder in (several["folder"] / "laplace", tmp_path))
    assert_bit_equal(one, other)
    assert isinstance(
        bayeformers.from_pretrained(several["folder"] / "laplace").posterior, bayeformers.LaplacePosterior
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after"])
def test_lora(how: str, several: dict[str, Any], tmp_path: Path) -> None:
    assert_bit_equal(several["adapted"][how], worker.adapted(tmp_path, "alone"))
    for file in sorted(tmp_path.iterdir()):
        other = several["folder"] / f"lora {how}" / file.name
        if file.suffix == ".safetensors":
            assert_bit_equal(load_file(other), load_file(file))
        elif file.suffix == ".json":
            assert json.loads(other.read_text()) == json.loads(file.read_text())
