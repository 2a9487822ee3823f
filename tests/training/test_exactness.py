"""The gradient of every optimizer step is that of mean NLL + KL / N, whatever the batch size and accumulation."""

from pathlib import Path

import pytest

from tests.training import steps

KINDS = ("single", "multi", "regression", "token", "masked", "causal", "llama", "seq2seq", "question")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "accumulation"), [(32, 1), (8, 4)])
def test_gradient_is_the_direct_one(kind: str, batch: int, accumulation: int, tmp_path: Path) -> None:
    recorded = steps.recorded(tmp_path, kind, batch=batch, accumulation=accumulation)
    assert [sum(len(b["input_ids"]) for b in step["fed"]) for step in recorded] == [32, 10]
    for step in recorded:
        expected = steps.direct_gradient(kind, step["state"], step["fed"], steps.num_items(kind))
        assert steps.relative_error(step["grads"], expected) < 1e-5


def test_unequal_token_counts_are_weighted_by_token(tmp_path: Path) -> None:
    """The micro-batches of the causal data hold different numbers of targets: means of means would be off."""
    step = steps.recorded(tmp_path, "causal", batch=4, accumulation=8)[0]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in step["fed"]]
    assert len(set(counts)) > 1
    expected = steps.direct_gradient("causal", step["state"], step["fed"], steps.num_items("causal"))
    assert steps.relative_error(step["grads"], expected) < 1e-5


def test_activation_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain = steps.recorded(tmp_path, "single", batch=32)
    checkpointed = steps.recorded(tmp_path, "single", batch=32, activation_checkpointing=True)
    for one, other in zip(plain, checkpointed, strict=True):
        assert steps.relative_error(other["grads"], one["grads"]) < 1e-6


@pytest.mark.parametrize("samples", [1, 3])
def test_activation_checkpointing_finds_the_live_draw_again(samples: int, tmp_path: Path) -> None:
    live = {"batch": 8, "accumulation": 4, "hold": False, "num_train_samples": samples}
    plain = steps.recorded(tmp_path, "single", **live)
    checkpointed = steps.recorded(tmp_path, "single", **live, activation_checkpointing=True)
    for one, other in zip(plain, checkpointed, strict=True):
        assert steps.relative_error(other["grads"], one["grads"]) < 1e-6


@pytest.fixture(scope="module")
def expectation() -> steps.Expectation:
    return steps.Expectation()


# More draws per step need fewer steps for the same error.
@pytest.mark.protects("kl_not_multiplied_by_samples")
@pytest.mark.parametrize(
    ("repeats", "batch", "accumulation", "samples"),
    [(120, 32, 1, 1), (30, 8, 4, 1), (40, 32, 1, 3)],
    ids=["32", "4x8", "3 draws"],
)
def test_live_noise_is_unbiased(
    repeats: int, batch: int, accumulation: int, samples: int, tmp_path: Path, expectation: steps.Expectation
) -> None:
    found = steps.live(
        tmp_path, repeats, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_samples=samples,
    )  # fmt: skip
    assert expectation.equals(found)
    assert not expectation.equals([{part: 2 * value for part, value in step.items()} for step in found])


def test_averaging_draws_reduces_the_noise(tmp_path: Path, expectation: steps.Expectation) -> None:
    found = steps.live(tmp_path, 40, per_device_train_batch_size=32, num_train_samples=4)
    # sd ratio sqrt(4) = 2; with 40 and 120 values its relative error is about 13 %, so 1.2 is 3 of them away
    assert expectation.values["means"].std() / expectation.along(found)["means"].std() > 1.2
