"""Two processes: the same chain, SWAG posterior and ensemble as one process's, bit for bit the same in both."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import chain_worker

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.chain_worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return chain_worker.results(tmp_path_factory.mktemp("one_process"), 4)


@pytest.mark.parametrize("kind", ["chain", "swag", "members"])
def test_draws_are_those_of_one_process(kind: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """To the rounding of sums in another order."""
    assert len(ranks[0][kind]) == len(alone[kind]) > 1
    for one, other, expected in zip(ranks[0][kind], ranks[1][kind], alone[kind], strict=True):
        for name, value in expected.items():
            assert torch.equal(one[name], other[name])
            torch.testing.assert_close(one[name], value, rtol=0, atol=1e-5)


def test_evaluations_are_those_of_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for kind in ("metrics", "swag metrics"):
        for name in ("eval_loss", "eval_mutual_information"):
            assert ranks[0][kind][name] == ranks[1][kind][name]
            assert ranks[0][kind][name] == pytest.approx(alone[kind][name], abs=1e-5)
