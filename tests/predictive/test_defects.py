"""Averages over draws and metrics: each property against the formula that broke it elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bayeformers import fixed_draw, metrics, predict, to_bayesian

DRAWS = 8


@pytest.mark.protects("average_probabilities")
def test_average_probabilities() -> None:
    """p = mean over draws of softmax(f_s); the softmax of mean logits is more certain than any mixture should be."""
    torch.manual_seed(0)
    model = to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), delta=1.0).eval()
    x = 3 * torch.randn(6, 4, dtype=torch.float64)
    found = predict(model, x, num_samples=DRAWS, seed=3)
    logits = []
    for index in range(DRAWS):
        with torch.no_grad(), fixed_draw(model, index, seed=3):
            logits.append(model(x))

    def check(log_probs: Tensor) -> None:
        expected = torch.stack([f.softmax(-1) for f in logits]).mean(0)
        torch.testing.assert_close(log_probs.exp(), expected, rtol=1e-5, atol=1e-6)

    check(found.mean_log_probs)
    with pytest.raises(AssertionError):
        check(torch.stack(logits).mean(0).log_softmax(-1))


@pytest.mark.protects("uncertainty_is_batched")
def test_uncertainty_is_batched() -> None:
    """One value per example, as of that example alone; a reduction over the batch gives one for all."""
    log_probs = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)

    def check(entropy: Callable[[Tensor], Tensor]) -> None:
        found = entropy(log_probs)
        assert found.shape == (4,)
        for n in range(4):
            p = log_probs[:, n].exp().mean(0)
            torch.testing.assert_close(found[n], -(p * p.log()).sum())

    def over_the_batch(log_probs: Tensor) -> Tensor:
        p = log_probs.exp().mean((0, 1))
        return -(p * p.log()).sum()

    check(metrics.predictive_entropy)
    with pytest.raises(AssertionError):
        check(over_the_batch)


@pytest.mark.protects("ties_in_any_order")
def test_ties_in_any_order() -> None:
    """AURC of equal confidences is the base error rate, in whatever order the examples stand."""

    def check(aurc: Callable[[NDArray[np.float64], NDArray[np.float64]], float]) -> None:
        confidence = np.full(6, 0.7)
        for errors in ([1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]):
            assert aurc(confidence, np.array(errors, float)) == pytest.approx(1 / 3)

    def by_stable_sort(confidence: NDArray[np.float64], error: NDArray[np.float64]) -> float:
        ranked = error[np.argsort(-confidence, kind="stable")]
        return float((ranked.cumsum() / np.arange(1, len(ranked) + 1)).mean())

    check(metrics.aurc)
    with pytest.raises(AssertionError):
        check(by_stable_sort)
