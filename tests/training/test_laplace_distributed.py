"""Two processes fit the posterior that one fits: every example counts once, and all processes have the same result."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import laplace_worker as worker

ROOT = Path(__file__).parents[2]
FITS = (*worker.KINDS, "ekfac", "holdout", "evidence", "leverage", "stream")
LOADERS = ("torch", "accelerate", "accelerate, shuffled")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.laplace_worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, worker.Described]:
    return worker.fits(tmp_path_factory.mktemp("one_process"))


def assert_same(found: worker.Described, expected: worker.Described, rtol: float = 1e-6) -> None:
    assert list(found["eigenvalues"]) == list(expected["eigenvalues"])
    for name, values in expected["eigenvalues"].items():
        scale = float(values.abs().max())
        torch.testing.assert_close(found["eigenvalues"][name], values, rtol=rtol, atol=rtol * scale, msg=name)
    for one, other in zip(found["variances"], expected["variances"], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=0)
    for name in ("prior_precision", "noise_std", "log_likelihood", "num_data"):
        assert found[name] == pytest.approx(expected[name], rel=rtol, nan_ok=True), name


@pytest.mark.parametrize("name", FITS)
def test_trainer(name: str, ranks: list[dict[str, Any]], alone: dict[str, worker.Described]) -> None:
    first, second = (rank["fits"][name] for rank in ranks)
    assert_same(first, second, rtol=0)
    assert first["num_data"] == worker.EXAMPLES
    assert_same(first, alone["single" if name == "stream" else name])


@pytest.mark.parametrize("name", LOADERS)
def test_duplicates_of_samplers_do_not_count(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, worker.Described]
) -> None:
    for rank in ranks:
        assert_same(rank["loaders"][name], alone["leverage"])


def test_a_layer_that_one_process_alone_calls(ranks: list[dict[str, Any]]) -> None:
    expected = worker.describe(worker.experts(list(reversed(worker.expert_batches()))))
    assert list(expected["eigenvalues"]) == ["expert", "head"]
    for rank in ranks:
        assert_same(rank["experts"], expected)


def test_resume(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["files"] == ["sums-0-of-2.safetensors", "sums-1-of-2.safetensors"]
        for found in rank["resumed"]:
            assert_same(found, rank["fits"]["single"], rtol=0)


def test_all_processes_refuse(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "1 examples for 2 processes" in rank["refusals"][0]
        assert "empty" in rank["refusals"][1]


def test_evaluation_is_that_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = worker.evaluated(tmp_path)
    for rank in ranks:
        for name in ("eval_nll", "eval_ece", "eval_mutual_information"):
            assert rank["evaluated"][name] == pytest.approx(expected[name], rel=1e-5), name
