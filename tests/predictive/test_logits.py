"""The unnormalised logits of draws, and the scores that need them, against the definitions in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bayeformers import predict, to_bayesian
from bayeformers.likelihoods import PROBLEM_TYPES, get_likelihood, logits_of
from bayeformers.posteriors import PointPosterior
from bayeformers.predictive import Predictive
from tests.cases import CASES, Case

KEPT = [this for this in CASES if this.name in ("roberta", "gpt2-lm", "bart-lm", "clip")]


def drawn(logits: Tensor) -> Predictive:
    """Of logits (S, B, C)."""
    log_probs = logits.log_softmax(-1)
    return Predictive(
        problem_type="single_label_classification", log_probs=log_probs, log_normalizers=logits.logsumexp(-1)
    )


@pytest.fixture
def logits() -> Tensor:
    return 4 * torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 2


def test_scores_are_their_definitions(logits: Tensor) -> None:
    predictive = drawn(logits)
    mean = logits.mean(0)
    torch.testing.assert_close(predictive.logits, logits)
    torch.testing.assert_close(predictive.energy, -mean.exp().sum(-1).log())
    torch.testing.assert_close(predictive.max_logit, -mean.max(-1).values)
    centred = logits - logits.mean(-1, keepdim=True)
    expected = (centred - centred.mean(0)).square().mean(0).mean(-1)
    torch.testing.assert_close(predictive.logit_variance, expected)


def test_a_shift_of_all_logits_moves_energy_alone(logits: Tensor) -> None:
    shift = torch.arange(7.0, dtype=torch.float64)
    before, after = drawn(logits), drawn(logits + shift[:, None])
    torch.testing.assert_close(after.energy, before.energy - shift)
    torch.testing.assert_close(after.max_logit, before.max_logit - shift)
    torch.testing.assert_close(after.logit_variance, before.logit_variance)
    torch.testing.assert_close(after.predictive_entropy, before.predictive_entropy)


def test_variance_of_a_linearised_predictive_is_the_trace_of_the_projected_covariance(logits: Tensor) -> None:
    factor = logits[0].unsqueeze(-1) * torch.eye(3, dtype=torch.float64) + logits[1].unsqueeze(-2)
    covariance = factor @ factor.mT
    given = Predictive(
        problem_type="single_label_classification", log_probs=logits.log_softmax(-1), logit_mean=logits[0],
        logit_covariance=covariance,
    )  # fmt: skip
    project = torch.eye(3, dtype=torch.float64) - 1 / 3
    expected = torch.stack([(project @ each @ project).trace() / 3 for each in covariance])
    torch.testing.assert_close(given.logit_variance, expected)
    torch.testing.assert_close(given.energy, -logits[0].logsumexp(-1))
    with pytest.raises(ValueError, match="`logit_mean`"):
        _ = given.logits


def test_a_multi_label_heads_logits_come_from_its_probabilities() -> None:
    logits = torch.tensor([[[-30.0, 0.5]], [[40.0, 2.5]]], dtype=torch.float64)  # S = 2, B = 1, L = 2
    log_probs = get_likelihood("multi_label_classification").values(SimpleNamespace(logits=logits), {})
    predictive = Predictive(problem_type="multi_label_classification", log_probs=log_probs)
    torch.testing.assert_close(predictive.logits, logits)
    mean = logits.mean(0)
    torch.testing.assert_close(predictive.energy, -(1 + mean.exp()).log().sum(-1))
    torch.testing.assert_close(predictive.logit_variance, logits.var(0, correction=0).mean(-1))


def test_a_regression_has_the_variance_of_its_values_and_no_energy() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    predictive = Predictive(problem_type="regression", values=values)
    torch.testing.assert_close(predictive.logit_variance, torch.tensor([1.0, 0.0]))
    for name in ("energy", "max_logit", "logits"):
        with pytest.raises(ValueError, match="regression"):
            getattr(predictive, name)


@pytest.mark.parametrize("this", KEPT, ids=lambda case: case.name)
def test_predict_keeps_the_logits_that_the_model_gave(this: Case) -> None:
    model = this.build().eval()
    with torch.no_grad():
        logits = logits_of(model(**this.inputs()))
    predictive = PointPosterior(model).predict(this.inputs())
    assert predictive.log_probs is not None
    assert predictive.log_normalizers is not None
    assert predictive.log_normalizers.numel() * predictive.log_probs.shape[-1] == predictive.log_probs.numel()
    torch.testing.assert_close(predictive.logits[0], logits.movedim(1, -1) if logits.dim() == 4 else logits)


def test_most_heads_keep_logits() -> None:
    kept = [
        name
        for name in PROBLEM_TYPES
        if get_likelihood(name).log_normalizers(SimpleNamespace(logits=torch.ones(2, 3)), torch.ones(2, 3)) is not None
    ]
    assert {"single_label_classification", "token_classification", "causal_lm", "seq2seq_lm"} <= set(kept)
    assert not {"regression", "multi_label_classification", "question_answering"} & set(kept)


def test_draws_of_a_converted_model_give_logits_that_vary() -> None:
    predictive = predict(to_bayesian(nn.Linear(4, 3), delta=0.5), torch.ones(2, 4), num_samples=8)
    assert predictive.logits.shape == (8, 2, 3)
    assert bool((predictive.logit_variance > 0).all())
    torch.testing.assert_close(predictive.logits.log_softmax(-1), predictive.log_probs)


def test_resized_logits_are_those_interpolated() -> None:
    logits = torch.randn(2, 1, 4, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small = Predictive(
        problem_type="semantic_segmentation", log_probs=logits.log_softmax(-1), log_normalizers=logits.logsumexp(-1)
    )
    channels_first = logits.flatten(0, 1).movedim(-1, 1)
    expected = nn.functional.interpolate(channels_first, size=(7, 5), mode="bilinear").movedim(1, -1)
    torch.testing.assert_close(small.resized((7, 5)).logits[:, 0], expected)


@pytest.mark.parametrize("shape", [(5, 7, 3), (7,), (4, 7)])
def test_normalizers_of_another_shape_are_refused(shape: tuple[int, ...], logits: Tensor) -> None:
    with pytest.raises(ValueError, match="`log_normalizers` must have the shape"):
        Predictive(
            problem_type="single_label_classification", log_probs=logits.log_softmax(-1),
            log_normalizers=torch.zeros(shape),
        )  # fmt: skip


def test_a_predictive_without_them_says_what_is_missing() -> None:
    predictive = Predictive(problem_type="single_label_classification", log_probs=torch.full((1, 1, 2), math.log(0.5)))
    with pytest.raises(ValueError, match="has no `logits`"):
        _ = predictive.energy
