"""Two processes: the gradient of the examples really fed, evaluation as in one process, different training noise."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bayeformers import fixed_draw
from bayeformers.losses import avuc_loss
from tests.training import steps, test_order, tiny, worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.training.worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_there_are_two_processes(ranks: list[dict[str, Any]]) -> None:
    assert [rank["world_size"] for rank in ranks] == [2, 2]


@pytest.mark.parametrize("kind", worker.TRAINED)
def test_gradient_is_that_of_all_that_was_fed(kind: str, ranks: list[dict[str, Any]]) -> None:
    """The first group is 32 examples; the last is the 10 left and 6 that the sampler repeats."""
    first, second = (rank["steps"][kind] for rank in ranks)
    sizes = []
    for one, other in zip(first, second, strict=True):
        fed = one["fed"] + other["fed"]
        sizes.append(sum(len(batch["input_ids"]) for batch in fed))
        assert steps.relative_error(one["grads"], other["grads"]) == 0
        expected = steps.direct_gradient(kind, one["state"], fed, steps.num_items(kind))
        assert steps.relative_error(one["grads"], expected) < 1e-5
    assert sizes == [32, 16]


@pytest.mark.parametrize("kind", worker.TRAINED)
def test_first_step_is_that_of_one_process(kind: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = steps.recorded(tmp_path, kind, batch=32)[0]
    assert steps.relative_error(ranks[0]["steps"][kind][0]["grads"], alone["grads"]) < 1e-5


@pytest.mark.parametrize("variant", ["checkpointed", "three draws"])
def test_gradient_does_not_depend_on_how_it_is_computed(variant: str, ranks: list[dict[str, Any]]) -> None:
    """With a held draw, recomputed activations and the mean over three equal draws change nothing."""
    first, found = ranks[0]["steps"]["single"][0], ranks[0][variant][0]
    assert steps.relative_error(found["grads"], first["grads"]) < 1e-5


def test_live_noise_is_unbiased(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["noise"] for rank in ranks)  # averaged over the processes, hence equal
    assert all(torch.equal(one["means"], other["means"]) for one, other in zip(first, second, strict=True))
    assert steps.Expectation().equals(first)


def test_resume_is_bit_exact(ranks: list[dict[str, Any]]) -> None:
    assert [rank["resumed"] for rank in ranks] == [0.0, 0.0]


def test_rows_come_back_in_the_datasets_order(ranks: list[dict[str, Any]]) -> None:
    examples = test_order.rows()
    for rank in ranks:
        for found in rank["by length"]:
            test_order.check(found, test_order.expected(), [example["labels"] for example in examples])


@pytest.mark.parametrize("kind", worker.EVALUATED)
def test_evaluation_is_that_of_one_process(kind: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = worker.evaluations(tmp_path)[kind]
    for rank in ranks:
        found = rank["evaluations"][kind]
        for name, value in alone["metrics"].items():
            if not name.endswith(("runtime", "per_second", "preparation_time")):
                assert found["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        for name, value in alone["uncertainty"].items():
            torch.testing.assert_close(found["uncertainty"][name], value, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_training_noise_differs_between_processes(ranks: list[dict[str, Any]]) -> None:
    assert not torch.allclose(ranks[0]["live"], ranks[1]["live"])


def test_a_layer_that_no_forward_calls_does_not_stop_training(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["unused"] == ranks[1]["unused"] > 0


def test_logs_are_means_over_processes(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["logs"] for rank in ranks)
    assert [entry["nll"] for entry in first] == [entry["nll"] for entry in second]
    for entry in first:
        assert entry["loss"] == pytest.approx(entry["nll"] + entry["kl"] / 20, rel=1e-5)


def test_calibration_threshold_is_that_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """Items of both ranks estimate it; the loss after the warm-up is the mean over all micro-batches of equal size."""
    model = tiny.bayesian().eval()
    spreads: dict[bool, list[float]] = {True: [], False: []}
    losses = []
    threshold = ranks[0]["calibrated"]["logs"][-1]["calibration_threshold"]
    for rank in ranks:
        for step, batches in enumerate(rank["calibrated"]["fed"]):
            for batch in batches:
                with torch.no_grad(), fixed_draw(model, steps.DRAW):
                    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                if step == 3:
                    losses.append(float(avuc_loss(logits, batch["labels"], threshold)))
                    continue
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                for right, value in zip(logits.argmax(-1) == batch["labels"], entropy, strict=True):
                    spreads[bool(right)].append(float(value))
    expected = sum(sum(values) / len(values) for values in spreads.values()) / 2
    assert sum(len(values) for values in spreads.values()) == 3 * 2 * 2 * 4
    assert threshold == pytest.approx(expected, rel=1e-4)
    logs = ranks[0]["calibrated"]["logs"]
    assert [entry["calibration_loss"] for entry in logs[:3]] == [0.0, 0.0, 0.0]
    assert logs[3]["calibration_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
