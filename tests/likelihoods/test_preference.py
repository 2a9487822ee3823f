"""Pairwise preferences against the formula of Bradley and Terry, in float64."""

import math

import pytest
import torch

from bayeformers import predict, to_bayesian
from bayeformers.laplace import fit
from bayeformers.likelihoods import get_likelihood
from tests.training import tiny

KIND = get_likelihood("pairwise_preference")


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("has_margin", [False, True])
def test_formula(shape: tuple[int, ...], has_margin: bool) -> None:
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    batch = {"input_ids": torch.zeros(6, 4, dtype=torch.long)}
    if has_margin:
        batch["margin"] = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    outputs = {"logits": scores.reshape(shape)}
    values, mask = KIND.nll(outputs, batch)
    margins = [float(m) for m in batch.get("margin", [0.0] * 3)]
    chances = [1 / (1 + math.exp(float(scores[i + 3] - scores[i]) + margins[i])) for i in range(3)]
    assert values.tolist() == pytest.approx([-math.log(chance) for chance in chances], rel=1e-12)
    assert mask.tolist() == KIND.item_mask(batch).tolist() == [True] * 3
    log_probs = KIND.values(outputs, batch)
    assert log_probs.exp().sum(-1).tolist() == pytest.approx([1.0] * 3, rel=1e-12)
    found, counted = KIND.scores(log_probs, batch) or ({}, mask)
    torch.testing.assert_close(found["nll"], values)
    assert found["labels"].tolist() == [0, 0, 0]
    assert counted.all()


def test_stacked_draws() -> None:
    scores = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stacked = KIND.values(scores, {}, is_stacked=True)
    torch.testing.assert_close(stacked, torch.stack([KIND.values(draw, {}) for draw in scores]))


@pytest.mark.parametrize("shape", [(6, 2), (2, 3, 1)])
def test_several_scores_per_answer_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one score per answer"):
        KIND.nll({"logits": torch.zeros(shape)}, {})


@pytest.mark.parametrize("rows", [0, 3])
def test_an_odd_number_of_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        KIND.item_mask({"input_ids": torch.zeros(rows, 4)})


def test_predict_says_which_answer_is_preferred() -> None:
    model = to_bayesian(tiny.plain("regression"), 0.3)
    predictive = predict(model, tiny.tokens(8), num_samples=3, problem_type="pairwise_preference")
    assert predictive.log_probs is not None
    assert predictive.log_probs.shape == (3, 4, 2)
    assert (predictive.mutual_information > 0).all()


def test_a_reward_head_has_no_laplace() -> None:
    model = tiny.plain("regression")
    model.config.problem_type = "pairwise_preference"
    with pytest.raises(ValueError, match="no Laplace posterior for a 'pairwise_preference' head"):
        fit(model, [tiny.tokens(8)], progress=False)


def test_a_reward_head_has_one_score() -> None:
    with pytest.raises(ValueError, match="`config.num_labels` must be 1"):
        KIND.check_head(tiny.plain("single").config)
