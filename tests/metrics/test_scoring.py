"""Scores against loops and scikit-learn."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss

from bayeformers import metrics
from bayeformers.metrics.scoring import PROBABILITY_FLOOR


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(4), size=200), rng.integers(4, size=200)


def test_scores_match_loops(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = predictions
    brier = np.mean([sum((probs[i, k] - (labels[i] == k)) ** 2 for k in range(4)) for i in range(200)])
    assert metrics.brier_score(probs, labels) == pytest.approx(brier, abs=1e-12)
    assert metrics.negative_log_likelihood(probs, labels) == pytest.approx(log_loss(labels, probs), abs=1e-12)
    assert metrics.accuracy(probs, labels) == accuracy_score(labels, probs.argmax(1))


def test_extremes() -> None:
    right, wrong = [[1.0, 0.0]], [[0.0, 1.0]]
    assert metrics.negative_log_likelihood(right, [0]) == 0 and metrics.brier_score(right, [0]) == 0
    assert metrics.brier_score(wrong, [0]) == 2
    assert metrics.negative_log_likelihood(wrong, [0]) == pytest.approx(-math.log(PROBABILITY_FLOOR))
    assert metrics.negative_log_likelihood([[1e-37, 1.0]], [0]) == pytest.approx(37 * math.log(10))  # not clipped


def test_arrays_of_any_kind_give_the_same_number(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = predictions
    expected = metrics.brier_score(probs, labels)
    assert metrics.brier_score(probs.tolist(), labels.tolist()) == expected
    tensor = torch.tensor(probs, requires_grad=True)
    assert metrics.brier_score(tensor, torch.tensor(labels)) == expected
    # float32 moves each probability by at most 2^-24, and a square of a difference <= 1 by twice that
    assert metrics.brier_score(tensor.float(), torch.tensor(labels)) == pytest.approx(expected, abs=4 * 2**-23)
    assert isinstance(expected, float)


def test_gaussian_nll_is_that_of_the_mixture() -> None:
    rng = np.random.default_rng(1)
    means, scales, targets = rng.normal(size=(6, 9)), rng.uniform(0.2, 2, size=(6, 9)), rng.normal(size=9)
    density = norm.pdf(targets, means, scales).mean(0)
    value = metrics.gaussian_negative_log_likelihood(means, scales, targets)
    assert value == pytest.approx(-np.log(density).mean(), abs=1e-12)
    assert metrics.gaussian_negative_log_likelihood(means[:1], 0.5, targets) == pytest.approx(
        -norm.logpdf(targets, means[0], 0.5).mean(), abs=1e-12
    )


def test_gaussian_nll_does_not_underflow() -> None:
    # every density is exp(-1e6/2) or less, 0 in float64
    value = metrics.gaussian_negative_log_likelihood([[1e3], [2e3]], 1.0, [0.0])
    assert value == pytest.approx(0.5e6 + 0.5 * math.log(2 * math.pi) + math.log(2))


def test_brier_score_of_a_vocabulary() -> None:
    """50,000 classes: memory of the order of the probabilities, not of C^2 (20 GB)."""
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(50_000), 2), np.array([7, 49_999])
    expected = np.mean([
        sum((p - (k == y)) ** 2 for k, p in enumerate(row)) for row, y in zip(probs, labels, strict=True)
    ])
    before = probs.copy()
    tracemalloc.start()
    assert metrics.brier_score(probs, labels) == pytest.approx(expected, rel=1e-12)
    assert tracemalloc.get_traced_memory()[1] < 8 * probs.nbytes
    tracemalloc.stop()
    assert (probs == before).all()
