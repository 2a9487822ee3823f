"""Posteriors that are set on a trainer: evaluation says what their `predict` says, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.posteriors import worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.evaluated(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", ["element", "unit", "temperature", "mixture", "calibrated mixture"])
def test_evaluation(name: str, alone: dict[str, Any]) -> None:
    posterior, (metrics, predictions, uncertainty) = worker.posteriors()[name], alone[name]
    rows = [worker.collate([row]) for row in worker.dataset()]
    found = [posterior.predict(row, num_samples=4) for row in rows]
    expected = torch.cat([one.mean_log_probs for one in found])
    np.testing.assert_allclose(predictions, expected, rtol=1e-3, atol=1e-4)
    for column in ("predictive_entropy", "expected_entropy", "mutual_information"):
        values = torch.cat([getattr(one, column) for one in found])
        np.testing.assert_allclose(uncertainty[column], values, rtol=1e-3, atol=1e-4)
    labels = torch.cat([row["labels"] for row in rows])
    nll = -expected.gather(1, labels[:, None]).mean()
    assert metrics["test_loss"] == pytest.approx(nll.item(), rel=1e-4)


@pytest.mark.slow
def test_two_processes(tmp_path: Path, alone: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.posteriors.worker", str(tmp_path)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        for name, (metrics, predictions, uncertainty) in torch.load(
            tmp_path / f"rank{rank}.pt", weights_only=False
        ).items():
            expected = alone[name]
            np.testing.assert_allclose(predictions, expected[1], rtol=1e-3, atol=1e-4)
            assert metrics["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=1e-4)
            for column, values in uncertainty.items():
                np.testing.assert_allclose(values, expected[2][column], rtol=1e-3, atol=1e-4)
