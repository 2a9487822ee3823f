"""A slice of `scripts/sweep.py`: sixty model classes of transformers' Auto tables, each in a process of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sweep(*arguments: str) -> list[str]:
    """Lines that the command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip(), done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_slice() -> None:
    lines = sweep("--sample", "60", "--seed", "1", "--jobs", "2")
    assert lines[-1] == "60 of 60 pass", "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_all() -> None:
    lines = sweep()
    passed, total = (int(word) for word in lines[-1].split() if word.isdigit())
    assert passed == total >= 624, "\n".join(lines)


def test_unknown_step_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(ROOT / "scripts" / "sweep.py")
    monkeypatch.setattr(sys, "argv", [script, "--steps", "convert,drow"])
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts folders of its own first
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # and sets this where it is not set
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().err
    assert "drow" in said and "gradients" in said
