"""Intervals: their coverage, their seed, and metrics that are undefined on some resamples."""

import math

import numpy as np
import pytest

from bayeformers import metrics


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_interval_of_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = metrics.bootstrap_ci(mean, values, num_resamples=2000)
    # a quantile of 2000 resamples has standard error sqrt(.025 * .975 / 2000) / phi(1.96) = .06 sigma: 4 of them
    expected = 1.96 * values.std() / math.sqrt(400)
    tolerance = 4 * 0.06 * values.std() / math.sqrt(400)
    assert interval.high - interval.estimate == pytest.approx(expected, abs=tolerance)
    assert interval.estimate - interval.low == pytest.approx(expected, abs=tolerance)


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    trials, hits = 400, 0
    for trial in range(trials):
        sample = rng.normal(size=100)
        interval = metrics.bootstrap_ci(mean, sample, num_resamples=200, confidence_level=0.9, seed=trial)
        hits += interval.low <= 0 <= interval.high
    # binomial standard error .015; 200 resamples and n = 100 cost about .01 more: 4 x .015 + .01
    assert hits / trials == pytest.approx(0.9, abs=0.07)


def test_same_seed_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=50)
    first, again = (metrics.bootstrap_ci(mean, values, num_resamples=50, seed=3) for _ in range(2))
    other = metrics.bootstrap_ci(mean, values, num_resamples=50, seed=4)
    assert first == again and first != other


def test_arrays_are_resampled_together() -> None:
    def spread(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max())

    interval = metrics.bootstrap_ci(spread, np.arange(30), np.arange(30), num_resamples=20)
    assert (interval.low, interval.high) == (0, 0)


def test_pairing_cancels_what_the_methods_share() -> None:
    rng = np.random.default_rng(3)
    difficulty = 10 * rng.normal(size=200)
    first, second = difficulty + 0.1 + 0.1 * rng.normal(size=200), difficulty
    interval = metrics.paired_bootstrap(mean, (first,), (second,))
    assert interval.excludes_zero and interval.estimate == pytest.approx(mean(first) - mean(second))
    assert interval.high - interval.low < 0.1 < metrics.bootstrap_ci(mean, first).high - mean(first)
    assert not metrics.paired_bootstrap(mean, (second,), (second,)).excludes_zero


def test_undefined_resamples_are_counted_and_left_out() -> None:
    error = np.array([1, 1] + [0] * 18)
    interval = metrics.bootstrap_ci(metrics.error_auroc, np.linspace(0, 1, 20), error, num_resamples=400)
    # P(no error among 20) = .9^20 = .122, standard error over 400 resamples .016: 4 of them
    assert interval.num_undefined / 400 == pytest.approx(0.122, abs=0.066)
    assert 0.5 < interval.low <= interval.estimate == interval.high == 1


def test_mostly_undefined_is_an_error() -> None:
    def fragile(values: np.ndarray) -> float:
        return 1.0 if len(set(values)) == len(values) else float("nan")

    with pytest.raises(metrics.UndefinedMetricError, match="no value on"):
        metrics.bootstrap_ci(fragile, np.arange(10), num_resamples=20)


def test_errors_of_the_metric_are_not_swallowed() -> None:
    with pytest.raises(metrics.UndefinedMetricError):
        metrics.bootstrap_ci(metrics.error_auroc, [0.1, 0.2], [0, 0])
    with pytest.raises(ValueError, match="sum to 1"):
        metrics.bootstrap_ci(metrics.brier_score, [[0.5, 0.6]], [0])
