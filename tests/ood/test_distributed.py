"""Two processes fit the density that one fits: every row counts once, and both have the same result."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ood import worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.ood.worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_fit_what_one_fits(ranks: list[dict[str, Any]]) -> None:
    alone = worker.scores(shares=False)
    for method, (count, new, calibration) in alone.items():
        for rank in ranks:
            found_count, found_new, found_calibration = rank["scores"][method]
            assert found_count == count == worker.ROWS
            if method == "auto":  # outliers are made up of each process' own rows
                continue
            torch.testing.assert_close(found_calibration, calibration, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(found_new, new, rtol=1e-7, atol=1e-7)
        assert torch.equal(ranks[0]["scores"][method][1], ranks[1]["scores"][method][1])


def test_an_empty_share_is_refused_by_both(ranks: list[dict[str, Any]]) -> None:
    assert all("empty" in rank["refusal"] for rank in ranks)
