"""Predictive quantities against loops in float64, and what a model's output means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig

from bayeformers.likelihoods import ProblemType, drawn_values, resolve_problem_type, token_mask
from bayeformers.predictive import Predictive, RunningPredictive
from bayeformers.training.columns import predict_batch
from tests.cases import CASES, Case, case

SHAPES = {"classes": (5, 4, 3), "labels": (5, 4, 6, 2), "tokens": (5, 2, 7, 3), "one draw": (1, 4, 3)}
UNCERTAINTIES = ("predictive_entropy", "expected_entropy", "mutual_information", "expected_pairwise_kl")


def log_probs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def predictive(values: Tensor) -> Predictive:
    return Predictive(problem_type="single_label_classification", log_probs=values)


def reference(draws: list[list[float]]) -> dict[str, float]:
    """One example by plain Python: draws of class log-probabilities."""
    count, classes = len(draws), range(len(draws[0]))
    probs = [[math.exp(value) for value in draw] for draw in draws]
    mean = [sum(p[c] for p in probs) / count for c in classes]
    total = -sum(m * math.log(m) for m in mean)
    aleatoric = -sum(p * math.log(p) for draw in probs for p in draw) / count
    pairs = [(a, b) for a in draws for b in draws]
    pairwise = sum(math.exp(x) * (x - y) for a, b in pairs for x, y in zip(a, b, strict=True)) / len(pairs)
    return {
        "predictive_entropy": total,
        "expected_entropy": aleatoric,
        "mutual_information": total - aleatoric,
        "expected_pairwise_kl": pairwise,
    }


@pytest.mark.protects("average_probabilities")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_uncertainties_match_a_loop(shape: tuple[int, ...]) -> None:
    draws = log_probs(*shape)
    result = predictive(draws)
    flat = draws.reshape(shape[0], -1, shape[-1])
    for name in UNCERTAINTIES:
        expected = torch.tensor([reference(flat[:, n].tolist())[name] for n in range(flat.shape[1])]).double()
        torch.testing.assert_close(getattr(result, name), expected.reshape(shape[1:-1]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.probs, draws.exp().mean(0))
    assert result.num_samples == shape[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_running_averages_equal_the_stacked_ones(shape: tuple[int, ...]) -> None:
    draws = log_probs(*shape)
    running, result = RunningPredictive(), predictive(draws)
    for draw in draws:
        running.update(draw)
    for name in ("mean_log_probs", *UNCERTAINTIES[:3]):
        torch.testing.assert_close(getattr(running, name), getattr(result, name), rtol=1e-10, atol=1e-12)


def test_running_averages_hold_probabilities_of_zero() -> None:
    running = RunningPredictive()
    for draw in torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]]).log():
        running.update(draw)
    torch.testing.assert_close(running.mutual_information, torch.tensor([math.log(2)]))
    assert running.mean_log_probs[0, 2] == -torch.inf


def test_mutual_information_is_zero_for_agreeing_draws_and_never_negative() -> None:
    same = log_probs(1, 50, 3).float().expand(7, -1, -1)
    assert (predictive(same).mutual_information >= 0).all()
    running = RunningPredictive()
    for draw in same:
        running.update(draw)
    assert (running.mutual_information >= 0).all()
    torch.testing.assert_close(running.mutual_information, torch.zeros(50), rtol=0, atol=1e-6)


def test_small_mutual_information_survives_float32() -> None:
    """About 1e-7 nats, the rounding of an entropy in float32: 1 % right, so that examples keep their rank.

    The logits' own rounding, 6e-8 of about 2, moves deviations of about 5e-4 by some 2e-4 of themselves.
    """
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(1, 40, 3, generator=generator, dtype=torch.float64)
    logits = centre + 5e-4 * torch.randn(8, 40, 3, generator=generator, dtype=torch.float64)
    probs = np.exp(logits.log_softmax(-1).numpy())
    mean = probs.mean(0)
    expected = torch.from_numpy((probs * np.log(probs)).sum(-1).mean(0) - (mean * np.log(mean)).sum(-1))
    assert 1e-9 < expected.min() < expected.median() < 2e-7
    batch = predict_batch(iter(logits.float()), {}, "single_label_classification")
    found = batch.uncertainty["mutual_information"]
    assert found.dtype == batch.predictions.dtype == torch.float32  # as they are gathered
    torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0)
    assert torch.equal(found.argsort(), expected.argsort())


def test_regression_matches_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1e4 + torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels, noise = values.mean(0) + 0.5, 0.7
    result = Predictive(problem_type="regression", values=values, noise_std=noise)
    running = RunningPredictive()
    for draw in values:
        running.update_values(draw)
    for n in range(3):
        column = values[:, n].tolist()
        mean = sum(column) / 6
        variance = sum((value - mean) ** 2 for value in column) / 6
        density = sum(
            math.exp(-0.5 * ((labels[n].item() - value) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
            for value in column
        )
        assert result.mean[n].item() == pytest.approx(mean, rel=1e-12)
        assert result.epistemic_variance[n].item() == pytest.approx(variance, rel=1e-9)
        assert running.mean[n].item() == pytest.approx(mean, rel=1e-12)
        assert running.epistemic_variance[n].item() == pytest.approx(variance, rel=1e-7)
        assert result.log_prob(labels)[n].item() == pytest.approx(math.log(density / 6), rel=1e-9)
    torch.testing.assert_close(result.aleatoric_variance, torch.full((3,), 0.49, dtype=torch.float64))


def test_log_prob_of_each_problem() -> None:
    draws = log_probs(5, 2, 4, 3)
    mean = draws.exp().mean(0).log()
    labels = torch.tensor([[0, 2, -100, 1], [1, 1, 0, -100]])
    tokens = Predictive(problem_type="token_classification", log_probs=draws).log_prob(labels)
    causal = Predictive(problem_type="causal_lm", log_probs=draws).log_prob(labels)
    for b in range(2):
        for t in range(4):
            label, following = labels[b, t].item(), labels[b, t + 1].item() if t < 3 else -100
            expected = math.nan if label == -100 else mean[b, t, label].item()
            assert tokens[b, t].item() == pytest.approx(expected, nan_ok=True)
            expected = math.nan if following == -100 else mean[b, t, following].item()
            assert causal[b, t].item() == pytest.approx(expected, nan_ok=True)
    spans = Predictive(problem_type="question_answering", log_probs=draws[:, :, :2])  # 3 positions
    scored = spans.log_prob(torch.tensor([[0, 2], [1, 3]]))
    assert scored[0, 1].item() == pytest.approx(mean[0, 1, 2].item())
    assert scored[1, 1].isnan()  # beyond the sequence


# -------------------------------------------------------------------------------------------------- model outputs


def test_multi_label_is_a_bernoulli_per_label() -> None:
    logits = torch.tensor([[0.3, -2.0, 90.0]], dtype=torch.float64)
    values = drawn_values({"logits": logits}, "multi_label_classification", {})
    torch.testing.assert_close(values.exp()[..., 1], logits.sigmoid())
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(1, 3, dtype=torch.float64))
    assert values.isfinite().all()  # log sigmoid(-90) is no log(0)


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_regression_has_one_value_per_example(shape: tuple[int, ...]) -> None:
    assert drawn_values(torch.zeros(shape), "regression", {}).shape == (4,)


def test_half_precision_logits_are_widened() -> None:
    assert drawn_values(torch.zeros(2, 3).bfloat16(), "single_label_classification", {}).dtype == torch.float32
    assert drawn_values(torch.zeros(2, 3).double(), "single_label_classification", {}).dtype == torch.float64


def test_an_answer_does_not_depend_on_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 1, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = drawn_values({"start_logits": start, "end_logits": end}, "question_answering", {"attention_mask": mask})
    short = drawn_values(
        {"start_logits": start[:, :3], "end_logits": end[:, :3]},
        "question_answering",
        {"attention_mask": mask[:, :3]},
    )
    torch.testing.assert_close(padded[..., :3], short)
    assert (padded[..., 3:] == -torch.inf).all()
    long, brief = (Predictive(problem_type="question_answering", log_probs=v[None]) for v in (padded, short))
    for name in (*UNCERTAINTIES, "variation_ratio"):
        torch.testing.assert_close(getattr(long, name), getattr(brief, name))
        assert getattr(long, name).shape == (1, 2)


def test_tuples_tensors_and_other_outputs() -> None:
    logits = torch.zeros(2, 3)
    for output in (logits, (logits, logits), {"logits": logits}, {"logits_per_image": logits}):
        assert drawn_values(output, "single_label_classification", {}).shape == (2, 3)
    assert drawn_values((logits, logits), "question_answering", {}).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="`output` needs `logits`, got dict with"):
        drawn_values({"last_hidden_state": logits}, "single_label_classification", {})
    with pytest.raises(ValueError, match="`output` needs `start_logits`"):
        drawn_values(logits, "question_answering", {})


def test_token_masks() -> None:
    values, mask = torch.zeros(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = {"attention_mask": mask, "decoder_attention_mask": mask.flip(1)}
    assert torch.equal(token_mask(values, "token_classification", inputs), mask.bool())
    assert torch.equal(token_mask(values, "seq2seq_lm", inputs), mask.flip(1).bool())
    assert token_mask(values[:, 0], "single_label_classification", inputs) is None
    assert token_mask(torch.zeros(2, 5, 4), "causal_lm", inputs) is None


# ---------------------------------------------------------------------------------------------------- problem types

EXPECTED: dict[str, ProblemType] = {
    "bert-regression": "regression",
    "bert-multi-label": "multi_label_classification",
    "bert-tokens": "token_classification",
    "xlm-roberta": "token_classification",
    "bert-mlm": "token_classification",
    "bert-qa": "question_answering",
    "t5": "seq2seq_lm",
    "bart-lm": "seq2seq_lm",
    "whisper": "seq2seq_lm",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_problem_type_of_every_case(case: Case) -> None:
    default: ProblemType = "causal_lm" if case.name.endswith("-lm") else "single_label_classification"
    assert resolve_problem_type(case.build()) == EXPECTED.get(case.name, default)


def test_problem_type_before_any_labelled_forward() -> None:
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    model = AutoModelForSequenceClassification.from_config(config)
    assert config.problem_type is None
    assert resolve_problem_type(model) == "single_label_classification"
    assert resolve_problem_type(model, torch.zeros(2, 3)) == "multi_label_classification"
    assert resolve_problem_type(model, torch.zeros(2).long()) == "single_label_classification"
    assert config.problem_type is None
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"`config.problem_type` must be one of .* got 'ranking'"):
        resolve_problem_type(model)


def test_problem_type_through_wrappers_and_subclasses() -> None:
    class Mine(type(case("bert").build())):  # type: ignore[misc]
        pass

    model = case("bert").build()
    model.__class__ = Mine
    assert resolve_problem_type(model) == "single_label_classification"
    assert resolve_problem_type(nn.DataParallel(model)) == "single_label_classification"
    assert resolve_problem_type(nn.Linear(2, 2)) == "unknown"


# ------------------------------------------------------------------------------------------------------- bad input

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Predictive(problem_type="regression", log_probs=log_probs(2, 2, 2)), "`values` are a regression's"),
    (lambda: Predictive(problem_type="causal_lm", values=torch.zeros(2, 2)), "`values` are a regression's"),
    (lambda: Predictive(problem_type="regression", values=torch.zeros(2, 2), noise_std=0.0), "`noise_std` must be"),
    (lambda: Predictive(problem_type="regression", values=torch.zeros(2, 2)).aleatoric_variance, "`noise_std`"),
    (lambda: Predictive(problem_type="regression", values=torch.zeros(2, 2)).log_prob(torch.zeros(2)), "`noise_std`"),
    (lambda: Predictive(problem_type="regression", values=torch.zeros(2, 2)).mutual_information, "no class prob"),
    (lambda: predictive(log_probs(2, 2, 3)).mean, "has no values"),
    (lambda: predictive(log_probs(2, 2, 3)).log_prob(torch.tensor([0, 3])), r"`labels` must lie in \[0, 3\)"),
    (lambda: predictive(log_probs(2, 2, 3)).log_prob(torch.tensor([0, -1])), r"`labels` must lie in \[0, 3\)"),
    (lambda: predictive(log_probs(2, 2, 3)).log_prob(torch.tensor([0])), r"shape \(2,\), got \(1,\)"),
    (lambda: predictive(torch.zeros(2, 2, 3)).predictive_entropy, "`log_probs` must be normalised"),
]


@pytest.mark.parametrize(("action", "message"), BAD)
def test_errors_say_what_is_wrong(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action()
