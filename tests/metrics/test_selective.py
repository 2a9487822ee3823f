"""Risk-coverage metrics against loops and against the average over the orders of ties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayeformers import metrics

cases = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.4]), st.booleans()), min_size=1, max_size=12)


@pytest.fixture
def known() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 1.5, 1000)
    return confidence, rng.random(1000) > confidence


def naive_risks(error: list[float]) -> list[float]:
    return [sum(error[:k]) / k for k in range(1, len(error) + 1)]


def test_known_values(known: tuple[np.ndarray, np.ndarray]) -> None:
    assert metrics.aurc(*known) == pytest.approx(0.12772, abs=5e-6)
    assert metrics.e_aurc(*known) == pytest.approx(0.09248, abs=5e-6)
    assert metrics.augrc(*known) == pytest.approx(0.08338, abs=5e-6)
    assert metrics.prr(*known) == pytest.approx(0.5753, abs=5e-5)


def test_without_ties_the_risks_are_those_of_a_loop(known: tuple[np.ndarray, np.ndarray]) -> None:
    confidence, error = known
    risks = naive_risks([float(error[i]) for i in np.argsort(-confidence)])
    curve = metrics.risk_coverage_curve(confidence, error)
    np.testing.assert_allclose(curve.risk, risks, atol=1e-12)
    np.testing.assert_allclose(curve.coverage, [k / 1000 for k in range(1, 1001)])
    assert metrics.augrc(*known) == pytest.approx(np.mean([r * k / 1000 for k, r in enumerate(risks, 1)]))


@pytest.mark.protects("ties_in_any_order")
def test_ties_are_the_mean_over_their_orders() -> None:
    rng = np.random.default_rng(1)
    confidence, error = rng.integers(4, size=30) / 4, rng.integers(2, size=30)
    samples = []
    for _ in range(4000):
        order = np.lexsort((rng.random(30), -confidence))
        samples.append(np.mean(naive_risks(error[order].tolist())))
    standard_error = np.std(samples) / math.sqrt(len(samples))
    assert metrics.aurc(confidence, error) == pytest.approx(np.mean(samples), abs=4 * standard_error)


@settings(deadline=None)
@given(cases, st.randoms())
def test_order_and_monotone_rescaling_do_not_matter(pairs: list[tuple[float, bool]], random) -> None:
    confidence, error = np.array([c for c, _ in pairs]), np.array([e for _, e in pairs])
    order = np.array(random.sample(range(len(pairs)), len(pairs)))
    for metric in (metrics.aurc, metrics.e_aurc, metrics.augrc):
        value = metric(confidence, error)
        assert value == pytest.approx(metric(confidence[order], error[order]), abs=1e-12)
        assert value == pytest.approx(metric(np.exp(10 * confidence), error), abs=1e-12)
    assert metrics.e_aurc(confidence, error) >= -1e-12
    assert 0 <= metrics.augrc(confidence, error) <= metrics.aurc(confidence, error) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_constant_confidence_gives_the_base_error_rate(seed: int) -> None:
    error = np.random.default_rng(seed).integers(2, size=50)
    confidence = np.full(50, 0.9)
    assert metrics.aurc(confidence, error) == pytest.approx(error.mean())
    np.testing.assert_allclose(metrics.risk_coverage_curve(confidence, error).risk, error.mean())
    assert metrics.prr(confidence, error) == pytest.approx(0, abs=1e-12)


def test_prr_is_one_for_the_oracle_and_zero_on_average_for_chance() -> None:
    rng = np.random.default_rng(2)
    error = rng.exponential(size=200)
    assert metrics.prr(-error, error) == pytest.approx(1)
    values = [metrics.prr(rng.random(200), error) for _ in range(500)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / math.sqrt(500))
    assert metrics.prr(error, error) < 0


def test_real_valued_errors_are_losses() -> None:
    assert metrics.aurc([3, 2, 1], [0.5, 1.5, 4.0]) == pytest.approx((0.5 + 1.0 + 2.0) / 3)


def test_risk_and_coverage_invert_each_other() -> None:
    confidence, error = [0.9, 0.8, 0.7, 0.6, 0.5], [0, 0, 1, 0, 1]
    assert metrics.risk_at_coverage(confidence, error, 0.6) == pytest.approx(1 / 3)
    assert metrics.risk_at_coverage(confidence, error, 0.61) == pytest.approx(1 / 4)
    assert metrics.risk_at_coverage(confidence, error, 1.0) == pytest.approx(2 / 5)
    assert metrics.risk_at_coverage(confidence, error, 0.0) == 0
    assert metrics.coverage_at_risk(confidence, error, 0.25) == pytest.approx(0.8)
    assert metrics.coverage_at_risk(confidence, error, 0.0) == pytest.approx(0.4)
    assert metrics.coverage_at_risk([0.9, 0.8], [1, 1], 0.5) == 0


def test_refusal_table_survives_rounding() -> None:
    error = np.array([0] * 9 + [1] * 11)  # 90 % at coverage 1/2, and 1 - 0.9 < 0.1 in floating point
    confidence = np.arange(20, 0, -1)
    row, perfect = metrics.refusal_table(confidence, error, [0.9, 1.0])
    assert (row.refused, row.accuracy) == (pytest.approx(0.5), pytest.approx(0.9))
    assert (perfect.refused, perfect.accuracy) == (pytest.approx(0.55), 1.0)
    (unreachable,) = metrics.refusal_table([2, 1], [1, 0], [0.9])
    assert unreachable.refused == 1 and math.isnan(unreachable.accuracy)


def test_avu_matches_counting(known: tuple[np.ndarray, np.ndarray]) -> None:
    uncertainty, error = 1 - known[0], known[1]
    result = metrics.accuracy_vs_uncertainty(uncertainty, error)
    assert len(result.thresholds) == 21
    assert result.thresholds[0] == uncertainty.min() and result.thresholds[-1] == uncertainty.max()
    for t, value in zip(result.thresholds, result.values, strict=True):
        accurate_certain = sum(1 for u, e in zip(uncertainty, error, strict=True) if not e and u <= t)
        inaccurate_uncertain = sum(1 for u, e in zip(uncertainty, error, strict=True) if e and u > t)
        assert value == pytest.approx((accurate_certain + inaccurate_uncertain) / 1000)
    assert result.area == pytest.approx(np.mean((result.values[1:] + result.values[:-1]) / 2))


def test_avu_of_constant_uncertainty_is_the_accuracy() -> None:
    assert metrics.accuracy_vs_uncertainty([0.3] * 4, [0, 0, 0, 1]).area == pytest.approx(0.75)
