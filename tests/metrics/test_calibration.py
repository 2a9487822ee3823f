"""Calibration errors against loops over bins; the temperature against scipy's minimiser."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from bayeformers import metrics


def as_probabilities(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of 100 classes whose maximum is ``confidence``, with labels that make it ``correct``."""
    rest = np.repeat((1 - confidence)[:, None] / 99, 99, axis=1)
    return np.hstack([confidence[:, None], rest]), np.where(correct, 0, 1)


def naive_ece(confidence: np.ndarray, correct: np.ndarray, num_bins: int) -> float:
    total = 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (b == 0 and c == 0)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(3), size=500), rng.integers(3, size=500)


@pytest.mark.parametrize(("num_bins", "expected"), [(10, 0.0440), (15, 0.0540), (20, 0.0496)])
def test_known_values(num_bins: int, expected: float) -> None:
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 1.5, 1000)
    wrong = rng.random(1000) > confidence
    probs, labels = as_probabilities(confidence, ~wrong)
    assert metrics.accuracy(probs, labels) == pytest.approx(0.747)
    assert metrics.expected_calibration_error(probs, labels, num_bins) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_ece_matches_a_loop(num_bins: int, predictions: tuple[np.ndarray, np.ndarray]) -> None:
    probs, labels = predictions
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    expected = naive_ece(confidence, correct, num_bins)
    assert metrics.expected_calibration_error(probs, labels, num_bins) == pytest.approx(expected, abs=1e-12)
    classwise = np.mean([naive_ece(probs[:, k], labels == k, num_bins) for k in range(3)])
    assert metrics.classwise_calibration_error(probs, labels, num_bins) == pytest.approx(classwise, abs=1e-12)


def test_bins_are_right_closed_and_the_first_holds_zero() -> None:
    bins = metrics.reliability_bins([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [0.75, 0.25]], [0, 1, 0, 0], num_bins=4)
    assert bins.counts.tolist() == [0, 2, 1, 1] and bins.num_bins == 4 and bins.edges.shape == (5,)
    assert bins.accuracy[1:].tolist() == [0.5, 1.0, 1.0] and math.isnan(bins.accuracy[0])
    assert metrics.classwise_calibration_error([[1.0, 0.0]], [1]) == 1.0


def test_maximum_is_over_filled_bins(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    bins = metrics.reliability_bins(*predictions, num_bins=10)
    filled = bins.counts > 0
    expected = np.abs(bins.accuracy - bins.confidence)[filled].max()
    assert metrics.maximum_calibration_error(*predictions, num_bins=10) == expected
    assert metrics.maximum_calibration_error([[1.0, 0.0]], [0]) == 0


def test_mass_bins_hold_equal_numbers(predictions: tuple[np.ndarray, np.ndarray]) -> None:
    for num_bins in (10, 15):
        counts = metrics.reliability_bins(*predictions, num_bins=num_bins, binning="mass").counts
        assert counts.sum() == 500 and counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]), min_size=1, max_size=40), st.integers(1, 20), st.randoms())
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_order_does_not_matter(binning: str, confidence: list[float], num_bins: int, random) -> None:
    probs = np.array([[c, 1 - c] for c in confidence])
    labels = np.array([random.randint(0, 1) for _ in confidence])
    order = np.array(random.sample(range(len(labels)), len(labels)))
    value = metrics.expected_calibration_error(probs, labels, num_bins, binning)  # type: ignore[arg-type]
    permuted = metrics.expected_calibration_error(probs[order], labels[order], num_bins, binning)  # type: ignore[arg-type]
    assert value == pytest.approx(permuted, abs=1e-12)
    assert 0 <= value <= metrics.maximum_calibration_error(probs, labels, num_bins, binning) + 1e-12  # type: ignore[arg-type]


def test_equal_confidences_share_a_mass_bin() -> None:
    probs, labels = np.full((10, 2), 0.5), np.array([0] * 7 + [1] * 3)
    assert metrics.reliability_bins(probs, labels, 5, "mass").counts.max() == 10
    assert metrics.expected_calibration_error(probs, labels, 5, "mass") == pytest.approx(0.2)


def test_temperature_minimises_the_nll() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2000, 4))
    labels = np.array([rng.choice(4, p=p) for p in softmax(logits / 2.5, axis=1)])

    def nll(log_temperature: float) -> float:
        log_probs = log_softmax(logits / math.exp(log_temperature), axis=1)
        return float(-log_probs[np.arange(2000), labels].mean())

    temperature = metrics.fit_temperature(logits, labels)
    reference = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x
    assert isinstance(temperature, float)
    assert math.log(temperature) == pytest.approx(reference, abs=1e-6)
    # standard error of log T from the curvature of the NLL is about 0.03 here; 5 of them
    assert temperature == pytest.approx(2.5, rel=0.15)


def test_temperature_scales_with_the_logits_and_ignores_shifts() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(300, 3)), rng.integers(3, size=300)
    logits[np.arange(200), labels[:200]] += 2
    temperature = metrics.fit_temperature(logits, labels)
    for factor in (1e-200, 1e-6, 1e6, 1e200):
        assert metrics.fit_temperature(factor * logits, labels) == pytest.approx(factor * temperature, rel=1e-6)
    assert metrics.fit_temperature(logits + rng.normal(size=(300, 1)), labels) == pytest.approx(temperature)


def test_temperature_at_its_limits() -> None:
    logits = np.array([[3.0, 0.0], [0.0, 1.0]])
    cold, hot = metrics.fit_temperature(logits, [0, 1]), metrics.fit_temperature(logits, [1, 0])
    assert 0 < cold < 0.01 and 500 < hot < 1e4
    assert softmax(logits / cold, axis=1)[[0, 1], [0, 1]].min() > 1 - 1e-12
    narrow = np.array([[3.0, 0.0], [1e-5, 0.0]])  # all right, but the NLL still falls at the lower bound
    assert metrics.fit_temperature(narrow, [0, 0]) == pytest.approx(1e-3 * math.sqrt(np.mean([1.5**2, 0.5e-5**2])))
    assert metrics.fit_temperature(np.zeros((4, 3)), [0, 1, 2, 0]) == 1.0
    assert metrics.fit_temperature(np.full((4, 3), 0.1), [0, 1, 2, 0]) == 1.0


def test_a_probability_of_one_lies_in_the_last_bin() -> None:
    """It has no bin of its own, as torchmetrics 1.9 gives it: 0.9999 and 1 differ by little."""
    probs = np.array([[0.08, 0.92], [0.0, 1.0]])
    assert metrics.expected_calibration_error(probs, np.array([1, 0]), num_bins=10) == pytest.approx(abs(0.5 - 0.96))
