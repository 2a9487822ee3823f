"""trl's trainers behind the mixin in two processes: the gradient of all that was fed, and one evaluation."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeformers import fixed_draw, kl_divergence
from tests.training import trainers
from tests.training.steps import DRAW, relative_error

pytest.importorskip("trl")
pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.trl_worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_gradient_is_that_of_all_that_was_fed(kind: str, ranks: list[dict[str, Any]]) -> None:
    """The last group is filled by rows that the sampler repeats."""
    from tests.training import test_trl, trl_worker

    reference = test_trl.with_adapter(trainers.llama()).eval()
    summed = trainers.token_nll if kind == "sft" else test_trl.policy_loss(reference)
    first, second = (rank[kind] for rank in ranks)
    assert first["num_items"] == second["num_items"] == (test_trl.ANSWERS if kind == "sft" else 6)
    model = trl_worker.plain(kind).train()
    for one, other, *fed in zip(first["steps"], second["steps"], first["fed"], second["fed"], strict=True):
        assert relative_error(one["grads"], other["grads"]) == 0
        model.load_state_dict(one["state"], strict=False)
        model.zero_grad()
        with fixed_draw(model, DRAW):
            found = [summed(model, batch) for batches in fed for batch in batches]
        total, count = (sum(parts) for parts in zip(*found, strict=True))
        (total / count + kl_divergence(model) / first["num_items"]).backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and n in one["grads"]}
        assert relative_error(one["grads"], expected) < 1e-5


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_evaluation_is_the_same_on_both(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[kind]["metrics"] for rank in ranks)
    for name in ("eval_loss", "eval_mutual_information", "eval_ece"):
        assert first[name] == second[name]
