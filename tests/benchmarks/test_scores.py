"""The metrics of many resamples at once against `bayeformers.metrics` on each."""

import numpy as np
import pytest

from bayeformers import metrics
from benchmarks.leaderboard.scores import METRICS, Judged, interval, resamples


def predictions(num_classes: int, *, coarse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of 60 rows; coarse ones have many equal confidences."""
    rng = np.random.default_rng(num_classes)
    probs = rng.dirichlet(np.ones(num_classes), size=60)
    if coarse:
        probs = probs.round(1) + 0.05
        probs /= probs.sum(1, keepdims=True)
    return probs, rng.integers(num_classes, size=60)


def reference(probs: np.ndarray, labels: np.ndarray) -> list[float]:
    confidence, error = probs.max(1), probs.argmax(1) != labels
    return [
        metrics.accuracy(probs, labels),
        metrics.negative_log_likelihood(probs, labels),
        metrics.expected_calibration_error(probs, labels),
        metrics.brier_score(probs, labels),
        metrics.aurc(confidence, error),
        metrics.error_auroc(confidence, error),
    ]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("num_classes", [2, 7])
def test_values_are_the_metrics_of_each_resample(num_classes: int, coarse: bool) -> None:
    probs, labels = predictions(num_classes, coarse=coarse)
    counts = resamples(len(labels), 20)
    found = Judged.of(probs, labels).values(counts)
    assert found.shape == (len(METRICS), 21) and (counts[0] == 1).all() and (counts.sum(1) == 60).all()
    for values, count in zip(found.T, counts, strict=True):
        index = np.repeat(np.arange(60), count.astype(int))
        np.testing.assert_allclose(values, reference(probs[index], labels[index]), rtol=1e-10, atol=1e-12)


def test_a_metric_without_a_value_is_nan() -> None:
    found = Judged.of(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 1])).values(np.ones((1, 2)))
    assert np.isnan(found[METRICS.index("error_auroc"), 0]) and found[METRICS.index("aurc"), 0] == 0


def test_interval_is_of_the_resamples_and_the_value_of_the_data() -> None:
    found = interval(np.array([5.0, *np.linspace(0, 1, 101)]))
    assert found == pytest.approx({"value": 5.0, "low": 0.025, "high": 0.975})
