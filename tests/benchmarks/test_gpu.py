"""The prepared run on a GPU: every check at tiny size on a CPU, and one that fails, crashes or hangs."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import DeviceError, Run, main

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = {
    "memory_formula": "a CPU has no allocator",
    "compiled_step_vit": "one model",
    "compiled_step_llama": "one model",
}
WORKER = """
import json, os, sys, time
file, names = sys.argv[1], sys.argv[2:]
def write(**line):
    open(file, "a").write(json.dumps(line) + "\\n")
write(checks={"good": 5, "bad": 5, "dies": 5, "hangs": 0.3, "late": 5}, machine={"device": "none"})
for name in names or ["good", "bad", "dies", "hangs", "late"]:
    write(name=name, status="running")
    if name == "dies":
        os._exit(9)
    if name == "hangs":
        time.sleep(30)
    result = {"status": "passed", "numbers": {"x": 0.5}}
    if name == "bad":
        result = {"status": "failed", "reason": "AssertionError: 2 != 1"}
    write(name=name, seconds=0.01, **result)
    if name == "bad":
        sys.exit(1)  # as where CUDA answers nothing any more
"""


# --- The run itself --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script wrote, run as its users run it."""
    folder = tmp_path_factory.mktemp("gpu")
    command = ["bash", "benchmarks/gpu.sh", "--tiny", "--device", "cpu", "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert json.loads(done.stdout.splitlines()[-2]) == results
    assert "| check |" in (folder / "results.md").read_text()
    return results


def test_every_check_passes_or_says_why_it_cannot_run(tiny: dict[str, Any]) -> None:
    from benchmarks.gpu.registry import CHECKS

    assert list(tiny["checks"]) == list(CHECKS)
    skipped = {name: result["reason"] for name, result in tiny["checks"].items() if result["status"] == "skipped"}
    assert skipped.keys() == NEEDS_A_GPU.keys()
    assert all(reason in skipped[name] for name, reason in NEEDS_A_GPU.items())


def test_every_ratio_is_a_positive_number(tiny: dict[str, Any]) -> None:
    measured = {
        name: result["numbers"] for name, result in tiny["checks"].items() if name.startswith(("steps", "draws_b"))
    }
    assert measured["steps_bert"].keys() == {"step, means frozen", "step, means trained", "plain step, ms"}
    assert all(value > 0 for numbers in measured.values() for value in numbers.values())


def test_limits_of_a_run_fit_its_time() -> None:
    """Right first: all checks of correctness may take their limits and leave half of the time."""
    from benchmarks.gpu.registry import CHECKS

    assert sum(check.seconds for check in list(CHECKS.values())[:14]) <= 290
    assert len({check.name for check in CHECKS.values()}) == len(CHECKS) and all("," not in name for name in CHECKS)


# --- Checks that would find something ---------------------------------------------------------------------------------
def test_a_wrong_result_is_an_assertion() -> None:
    import torch

    from benchmarks.gpu.checks import below, error

    assert error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert below(0.3, x=0.25) == {"x": 0.25}
    with pytest.raises(AssertionError, match="x"):
        below(0.2, x=0.25)
    with pytest.raises(AssertionError):
        below(0.2, x=float("nan"))


@pytest.mark.parametrize("check", ["mean_equals_cpu", "draws_repeat", "autocast"])
def test_another_model_on_the_device_is_found(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that differ, noise that changes, a KL in half precision."""
    import torch

    from benchmarks.gpu import checks
    from benchmarks.gpu.setup import Setup, twins

    def others(setup: Setup) -> Any:
        cpu, device, inputs = twins(setup)
        with torch.no_grad():
            next(p for name, p in device.named_parameters() if name.endswith("_rho")).add_(0.5)
        return cpu, device, inputs

    setup = Setup(torch.device("cpu"), tiny=True)
    if check == "mean_equals_cpu":
        monkeypatch.setattr(checks, "twins", others)
    elif check == "draws_repeat":
        plain = checks.logits
        monkeypatch.setattr(checks, "logits", lambda *args: plain(*args) + torch.rand(()))
    else:
        monkeypatch.setattr(checks, "kl_divergence", lambda model: sum(p.sum() for p in model.parameters()).bfloat16())
    with pytest.raises(AssertionError):
        getattr(checks, check)(setup)


# --- The supervisor ---------------------------------------------------------------------------------------------------
def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    settings = {"device": "cpu", "tiny": True, "seconds": 60.0, "only": None, "output_dir": folder, **changes}
    return argparse.Namespace(**settings)


def run_of(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = WORKER, **changes: Any) -> Run:
    (folder / "worker.py").write_text(source)
    run = Run(arguments(folder, **changes))
    command = [sys.executable, str(folder / "worker.py"), str(run.lines)]
    monkeypatch.setattr(run, "_command", lambda names: [*command, *names])
    run.everything()
    return run


def test_one_that_fails_crashes_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, monkeypatch)
    states = {name: result["status"] for name, result in run.results()["checks"].items()}
    assert states == {"good": "passed", "bad": "failed", "dies": "failed", "hangs": "failed", "late": "passed"}
    reasons = {name: result.get("reason") for name, result in run.found.items()}
    assert reasons["dies"] == "its process ended with status 9" and reasons["hangs"] == "it took longer than 0.3 s"
    assert json.loads((tmp_path / "results.json").read_text()) == run.results()
    assert "| bad | failed | 0.01 | AssertionError: 2 != 1 |" in (tmp_path / "results.md").read_text()


def test_a_run_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    run = run_of(tmp_path, monkeypatch, WORKER.replace('"hangs": 0.3', '"hangs": 300'), seconds=3.0)
    assert time.monotonic() - start < 20
    assert run.found["hangs"] == {"status": "failed", "reason": "no time was left of 3 s"}
    assert run.found["late"] == {"status": "skipped", "reason": "no time was left"}


def test_some_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, monkeypatch, only="late,good")
    assert list(run.results()["checks"]) == ["late", "good"]


def test_no_such_device_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="device 'cpu': RuntimeError: no device"):
        run_of(tmp_path, monkeypatch, "raise RuntimeError('no device')")


def test_an_unknown_check_is_named(tmp_path: Path) -> None:
    from benchmarks.gpu import worker

    with pytest.raises(SystemExit, match="'nope' is no check; there are mean_equals_cpu"):
        worker.main(["--tiny", "--device", "cpu", "--file", str(tmp_path / "lines.jsonl"), "nope"])


@pytest.mark.parametrize(("status", "expected"), [("passed", 0), ("skipped", 0), ("failed", 1), (None, 2)])
def test_exit_status_tells(
    status: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def everything(run: Run) -> None:
        if status is None:
            raise DeviceError("device 'cuda': none")
        run.wanted, run.found = ["x"], {"x": {"status": status, "reason": "why"}}

    monkeypatch.setattr(Run, "everything", everything)
    assert main(["--output_dir", str(tmp_path)]) == expected
    written = capsys.readouterr()
    assert "device 'cuda': none" in written.err if status is None else f"1 {status}" in written.out
