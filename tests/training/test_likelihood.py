"""Each item's NLL against its definition, item counts, and labels that do not fit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from bayeformers.likelihoods import resolve_problem_type
from bayeformers.training.items import align_causal, count_items, item_nll, output_field
from tests.training import tiny

KINDS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
    "token": "token_classification",
    "causal": "causal_lm",
    "seq2seq": "seq2seq_lm",
    "question": "question_answering",
}


def test_single_label_is_minus_the_log_softmax() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, -100])
    values, mask = item_nll(logits, {"labels": labels}, "single_label_classification")
    probs = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = [-math.log(probs[i, labels[i]]) for i in range(4)]
    torch.testing.assert_close(values, torch.tensor([*expected, 0.0], dtype=torch.float64))
    assert mask.tolist() == [True] * 4 + [False]


def test_labels_may_have_a_trailing_axis() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    flat = item_nll(logits, {"labels": labels}, "single_label_classification").values
    column = item_nll(logits, {"labels": labels[:, None]}, "single_label_classification").values
    assert torch.equal(flat, column)


def test_multi_label_is_summed_over_labels() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    values, _ = item_nll(logits, {"labels": labels}, "multi_label_classification")
    bernoulli = torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(values, -bernoulli.log_prob(labels.double()).sum(1))


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_is_a_normalised_density(outputs: int) -> None:
    mean, labels = torch.randn(4, outputs, dtype=torch.float64), torch.randn(4, outputs, dtype=torch.float64)
    targets = labels.squeeze(1) if outputs == 1 else labels
    values, _ = item_nll(mean, {"labels": targets}, "regression", noise_std=0.3)
    torch.testing.assert_close(values, -torch.distributions.Normal(mean, 0.3).log_prob(labels).sum(1))


def test_causal_position_predicts_the_next_token() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, 2, -100, 3]])
    values, mask = item_nll(logits, {"labels": labels}, "causal_lm")
    log_probs = logits.log_softmax(-1)
    torch.testing.assert_close(values, -torch.stack([log_probs[0, 0, 2], torch.tensor(0.0), log_probs[0, 2, 3]])[None])
    assert mask.tolist() == [[True, False, True]]


def test_shifted_labels_of_a_collator_are_not_shifted_again() -> None:
    logits, labels = torch.randn(1, 4, 5), torch.tensor([[1, 2, 0, 3]])
    shifted = torch.tensor([[2, 0, 3, -100]])
    own = item_nll(logits, {"labels": labels}, "causal_lm").sum()
    given = item_nll(logits, {"shift_labels": shifted}, "causal_lm").sum()
    torch.testing.assert_close(own, given)
    assert count_items({"shift_labels": shifted}, "causal_lm") == count_items({"labels": labels}, "causal_lm") == 3


def test_virtual_tokens_predict_nothing() -> None:
    logits, labels = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 4))
    aligned, targets = align_causal(logits, labels)
    assert torch.equal(aligned, logits[:, 2:-1])
    assert torch.equal(targets, labels[:, 1:])


@pytest.mark.parametrize("family", ["causal", "llama"])
def test_causal_nll_is_the_models_loss_where_that_is_right(family: str) -> None:
    model, batch = tiny.plain(family).eval(), tiny.dataset("causal", 6).columns
    item = item_nll(model(**{k: v for k, v in batch.items() if k != "labels"}), batch, "causal_lm")
    torch.testing.assert_close(item.sum() / count_items(batch, "causal_lm"), model(**batch).loss)


@pytest.mark.parametrize("kind", ["single", "token", "masked", "seq2seq"])
def test_nll_is_the_models_loss_where_that_is_right(kind: str) -> None:
    model, batch = tiny.plain(kind).eval(), tiny.dataset(kind, 6).columns
    problem = KINDS.get(kind, "token_classification")
    outputs = model(**batch)
    item = item_nll(outputs, batch, problem)
    torch.testing.assert_close(item.sum() / count_items(batch, problem), outputs.loss)


def _spans(start: list[int], end: list[int], **more: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(len(start), 5).long(), "start_positions": torch.tensor(start),
            "end_positions": torch.tensor(end), **more}  # fmt: skip


def test_question_answering_adds_both_ends() -> None:
    outputs = {"start_logits": torch.randn(2, 5), "end_logits": torch.randn(2, 5)}
    values, _ = item_nll(outputs, _spans([0, 3], [1, 4]), "question_answering")
    start, end = (outputs[f"{side}_logits"].log_softmax(-1) for side in ("start", "end"))
    torch.testing.assert_close(values, -torch.stack([start[0, 0] + end[0, 1], start[1, 3] + end[1, 4]]))


def test_positions_outside_the_sequence_add_nothing() -> None:
    outputs = {"start_logits": torch.randn(4, 5), "end_logits": torch.randn(4, 5)}
    batch = _spans([0, 9, -1, 5], [9, 1, -1, 5])
    values, mask = item_nll(outputs, batch, "question_answering")
    assert mask.tolist() == [True, True, False, False]
    assert values[0] == -outputs["start_logits"].log_softmax(-1)[0, 0]
    assert values[2:].tolist() == [0, 0]
    assert count_items(batch, "question_answering") == 2


def test_question_answering_does_not_depend_on_padding() -> None:
    logits = {"start_logits": torch.randn(1, 5), "end_logits": torch.randn(1, 5)}
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = item_nll(logits, _spans([1], [2], attention_mask=mask), "question_answering").values
    short = {name: value[:, :3] for name, value in logits.items()}
    alone = {**_spans([1], [2]), "input_ids": torch.zeros(1, 3).long()}
    torch.testing.assert_close(padded, item_nll(short, alone, "question_answering").values)
    batch = _spans([4], [4], attention_mask=mask)  # on padding: no answer there
    assert not item_nll(logits, batch, "question_answering").mask.any()
    assert count_items(batch, "question_answering") == 0


def test_unknown_head_uses_the_models_own_mean_loss() -> None:
    outputs = {"loss": torch.tensor(2.0)}
    item = item_nll(outputs, {"pixels": torch.zeros(3, 2), "labels": [{}, {}, {}]}, "unknown")
    assert item.sum() == 6


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_count_is_the_size_of_the_mask(kind: str) -> None:
    model, batch = tiny.plain(kind).eval(), tiny.dataset(kind, 7).columns
    outputs = model(**batch)
    assert count_items(batch, KINDS[kind]) == item_nll(outputs, batch, KINDS[kind], 1.0).mask.sum()


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 3).bfloat16()
    values = item_nll(logits, {"labels": torch.zeros(4).long()}, "single_label_classification").values
    assert values.dtype == torch.float32
    assert torch.equal(values, -logits.float().log_softmax(-1)[:, 0])


def test_gradient_reaches_the_logits() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    item_nll(logits, {"labels": torch.tensor([0, 1, 2, -100])}, "single_label_classification").sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:3] != 0).all()
    assert (logits.grad[3] == 0).all()


@pytest.mark.parametrize(
    "output", [torch.ones(2), (torch.ones(2),), {"logits": torch.ones(2)}, hf.utils.ModelOutput(logits=torch.ones(2))]
)
def test_logits_are_found_in_every_kind_of_output(output: Any) -> None:
    assert torch.equal(output_field(output, "logits"), torch.ones(2))


@pytest.mark.parametrize(
    ("problem", "logits", "labels", "message"),
    [
        ("single_label_classification", (2, 3), torch.tensor([0, 3]), r"`labels` must lie in \[0, 3\).*got 3"),
        ("single_label_classification", (2, 3), torch.tensor([0, -1]), r"`labels` must lie in .*got -1"),
        ("single_label_classification", (2, 3), torch.tensor([0.0, 1.0]), r"`labels` must be integer classes"),
        ("single_label_classification", (2, 3), torch.tensor([0, 1, 1]), r"`labels` must have shape \(2,\)"),
        ("single_label_classification", (2, 3), None, r"`labels` must be a tensor"),
        ("token_classification", (2, 4, 3), torch.zeros(2, 3).long(), r"`labels` must have shape \(2, 4\)"),
        ("token_classification", (1, 2, 3), torch.tensor([[0, 7]]), r"`labels` must lie in .*got 7"),
        ("causal_lm", (1, 3, 5), torch.tensor([[0, 5, 1]]), r"`labels` must lie in .*got 5"),
        ("multi_label_classification", (2, 3), torch.zeros(2, 2), r"`labels` must have shape \(2, 3\)"),
        ("multi_label_classification", (1, 2), torch.tensor([[0.0, 2.0]]), r"`labels` of a multi-label head"),
        ("regression", (2, 1), torch.zeros(3), r"`labels` must have 2 numbers"),
        ("regression", (2, 1), torch.tensor([0.0, math.nan]), r"`labels` of a regression must be finite"),
    ],
)
def test_labels_that_do_not_fit_are_named(problem: str, logits: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        item_nll(torch.zeros(logits), {"labels": labels}, problem, 1.0)


@pytest.mark.parametrize("noise_std", [None, 0.0, -1.0, math.inf, math.nan])
def test_regression_needs_a_noise(noise_std: float | None) -> None:
    with pytest.raises(ValueError, match="`noise_std` must be a number > 0"):
        item_nll(torch.zeros(2, 1), {"labels": torch.zeros(2)}, "regression", noise_std)


def test_output_without_logits_or_loss() -> None:
    with pytest.raises(ValueError, match="needs `logits`, got dict with"):
        item_nll({"hidden": torch.zeros(1)}, {"labels": torch.zeros(1).long()}, "token_classification")
    with pytest.raises(ValueError, match="no `loss`"):
        item_nll({"logits": torch.zeros(1)}, {"labels": torch.zeros(1).long()}, "unknown")


def test_a_training_resolves_its_likelihood_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = []

    def count(*args: Any, **kwargs: Any) -> str:
        resolved.append(resolve_problem_type(*args, **kwargs))
        return resolved[-1]

    monkeypatch.setattr("bayeformers.training.items.resolve_problem_type", count)
    tiny.trainer(tmp_path, max_steps=4, num_train_samples=2, gradient_accumulation_steps=2).train()
    assert resolved == ["single_label_classification"]
