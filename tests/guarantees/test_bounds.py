"""The exact bounds: against enumeration of all error sequences, and against distributions made to break them."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from bayeformers.guarantees import clopper_pearson, error_allowance, least_examples, smallest_refusal
from bayeformers.guarantees.abstention import certified_threshold
from bayeformers.guarantees.bounds import crossing_probability


def enumerated(allowed: np.ndarray, risk: float) -> float:
    """P(exists m: F_m <= c_m), summed over all 2^n sequences."""
    n, total = len(allowed) - 1, 0.0
    for sequence in itertools.product((0, 1), repeat=n):
        counts = np.cumsum(sequence)
        if (counts <= allowed[1:]).any():
            total += math.prod(risk if error else 1 - risk for error in sequence)
    return total


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("risk", [0.1, 0.3, 0.55])
def test_crossing_probability_is_that_of_all_sequences(risk: float, confidence: float) -> None:
    allowed = error_allowance(11, risk, confidence)
    assert crossing_probability(allowed, risk) == pytest.approx(enumerated(allowed, risk), abs=1e-11)
    assert enumerated(allowed, risk) <= 1 - confidence


def test_allowance_is_the_largest_of_one_level() -> None:
    """A level that admits one error more anywhere breaks the promise."""
    risk, n = 0.2, 14
    allowed = error_allowance(n, risk, 0.9)
    ranks = np.arange(1, n + 1)
    level = binom.cdf(allowed[1:], ranks, risk).max()
    following = min(value for m in ranks for k in range(m + 1) if (value := binom.cdf(k, m, risk)) > level + 1e-12)
    larger = np.array([
        -1,
        *(max((k for k in range(m + 1) if binom.cdf(k, m, risk) <= following), default=-1) for m in ranks),
    ])
    assert (larger >= allowed).all()
    assert enumerated(larger, risk) > 0.1


@pytest.mark.parametrize(("risk", "confidence"), [(0.05, 0.9), (0.1, 0.95), (0.01, 0.9), (0.5, 0.75)])
def test_fewest_rows(risk: float, confidence: float) -> None:
    least = least_examples(risk, confidence)
    assert (1 - risk) ** least <= 1 - confidence + 1e-12 < (1 - risk) ** (least - 1) + 2e-12
    assert error_allowance(least, risk, confidence)[-1] == 0
    assert (error_allowance(least - 1, risk, confidence) == -1).all()


def test_clopper_pearson_is_where_the_tail_is_the_rest() -> None:
    for errors, count in [(0, 45), (3, 100), (9, 10)]:
        bound = clopper_pearson(errors, count, 0.9)
        assert binom.cdf(errors, count, bound) == pytest.approx(0.1, abs=1e-9)
    assert clopper_pearson(10, 10) == clopper_pearson(0, 0) == 1.0


def test_no_rule_refuses_less_than_the_feasibility_bound() -> None:
    """An oracle that refuses wrong answers first is at the bound, up to one row."""
    n, wrong, risk = 1000, 237, 0.05
    refused = next(r for r in range(n) if max(wrong - r, 0) <= risk * (n - r))
    assert refused / n == pytest.approx(smallest_refusal(wrong / n, risk), abs=1 / n)
    assert smallest_refusal(0.04, 0.05) == 0.0


LAWS = {
    # risk just above the target everywhere: scores say nothing
    "flat": lambda u: np.full_like(u, 0.11),
    # safe on the surest third, then just enough errors that all thresholds beyond are above the target
    "step": lambda u: np.where(u < 1 / 3, 0.0, 0.34),
    # the risk crosses the target up and down: errors and right answers in turn
    "waves": lambda u: np.where((u * 8) % 1 < 0.12, 1.0, 0.0),
    # the surest are the worst
    "reversed": lambda u: 0.35 - 0.35 * u,
}


@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("n", [10, 19, 20, 50, 200])
@pytest.mark.parametrize("law", LAWS)
def test_risk_is_above_the_target_no_more_often_than_promised(law: str, n: int, levels: int | None) -> None:
    """True selective risks by integration over 40,000 points; ``levels``: scores of few values, hence ties."""
    risk, confidence, trials = 0.1, 0.8, 300
    grid = (np.arange(40_000) + 0.5) / 40_000
    shown = grid if levels is None else np.floor(grid * levels)
    cumulated = np.cumsum(LAWS[law](grid)) / np.arange(1, len(grid) + 1)
    generator = np.random.default_rng(n)
    failures = 0
    for _ in range(trials):
        u = generator.random(n)
        errors = (generator.random(n) < LAWS[law](u)).astype(float)
        scores = -(u if levels is None else np.floor(u * levels))
        threshold = certified_threshold(scores, errors, risk, confidence)
        answered = np.searchsorted(shown, -threshold, side="right")
        failures += bool(answered) and cumulated[answered - 1] > risk
    # a Binomial(300, 0.2) exceeds its 1 - 1e-4 quantile in one of 10,000 runs
    assert failures <= binom.ppf(1 - 1e-4, trials, 1 - confidence)


def test_threshold_answers_as_many_as_are_certified_and_equal_scores_together() -> None:
    scores = np.repeat([3.0, 2.0, 1.0], [40, 30, 30])
    errors = np.concatenate([np.zeros(70), np.ones(30)])
    assert certified_threshold(scores, errors, 0.1, 0.9) == 1.5
    assert certified_threshold(scores, np.zeros(100), 0.1, 0.9) == -math.inf
    assert certified_threshold(scores, np.ones(100), 0.1, 0.9) == math.inf
    with_nan = np.where(np.arange(100) < 90, scores, np.nan)
    assert certified_threshold(with_nan, np.zeros(100), 0.1, 0.9) == -math.inf  # NaN is refused whatever the threshold
    one_value = certified_threshold(np.ones(100), np.zeros(100), 0.1, 0.9)
    assert one_value == -math.inf


def test_order_of_rows_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 9, 80).astype(float)
    errors = (generator.random(80) < 0.3 / (1 + scores)).astype(float)
    expected = certified_threshold(scores, errors, 0.1, 0.8)
    for _ in range(5):
        order = generator.permutation(80)
        assert certified_threshold(scores[order], errors[order], 0.1, 0.8) == expected


def test_many_rows_are_as_exact() -> None:
    allowed = error_allowance(3000, 0.05, 0.9)
    crossing = crossing_probability(allowed, 0.05)
    assert 0.099 < crossing <= 0.1
    # by simulation: 4,000 walks, 5 standard errors
    walks = (np.random.default_rng(1).random((4000, 3000), dtype=np.float32) < 0.05).cumsum(1, dtype=np.int32)
    share = (walks <= allowed[1:]).any(1).mean()
    assert abs(share - crossing) < 5 * math.sqrt(0.09 / 4000)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, float("nan"), "0.05", True, None])
def test_a_share_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="`max_risk` must be above 0 and below 1"):
        error_allowance(50, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`confidence` must be above 0 and below 1"):
        least_examples(0.05, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("errors", "count"), [(5, 4), (-1, 4), (1.5, 4), (0, -1), (0, None)])
def test_counts_that_are_none_are_refused(errors: object, count: object) -> None:
    with pytest.raises(ValueError, match="`(errors|count)` must be"):
        clopper_pearson(errors, count)  # type: ignore[arg-type]
