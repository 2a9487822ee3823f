"""Conformal thresholds and p-values: against their definitions, by enumeration, with ties and too few rows."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from bayeformers.guarantees import benjamini_hochberg, conformal_p_values, conformal_quantile, coverage_interval
from bayeformers.guarantees.quantiles import Cutoff, Cutoffs, group_keys
from bayeformers.metrics.conformal import conformal_rank, least_rows

ALPHAS = ["1/20", "1/10", "1/5", "3/10", "1/3", "1/2", "9/10", "1/100"]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rank_is_the_ceiling_in_exact_arithmetic(alpha: str) -> None:
    share = Fraction(alpha)
    for n in range(400):
        expected = math.ceil((n + 1) * (1 - share))
        assert conformal_rank(n, float(share)) == expected == conformal_rank(n, 1 - float(1 - share))
        assert (conformal_rank(n, float(share)) <= n) == (n >= least_rows(float(share)))


@pytest.mark.protects("ties_in_any_order")
@pytest.mark.parametrize("decimals", [9, 1])  # distinct; many equal
@pytest.mark.parametrize("n", [1, 2, 9, 10, 19, 20, 50])
def test_quantile_is_the_smallest_score_with_enough_below(n: int, decimals: int) -> None:
    scores = np.random.default_rng(n).random(n).round(decimals)
    for alpha in map(Fraction, ALPHAS):
        enough = [s for s in scores if (scores <= s).sum() >= (n + 1) * (1 - alpha)]
        assert conformal_quantile(list(scores), float(alpha)) == min(enough, default=math.inf)


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.0, 1.0, 1.0, 2.0, 2.0], [3.0] * 6])
@pytest.mark.parametrize("alpha", [0.17, 0.2, 0.4, 0.5, 0.99])
def test_coverage_over_all_ways_to_leave_one_out(scores: list[float], alpha: float) -> None:
    """n + 1 exchangeable scores, any of which may be the new one: between 1 - alpha and 1 - alpha + 1/(n + 1)."""
    covered = sum(s <= conformal_quantile([*scores[:i], *scores[i + 1 :]], alpha) for i, s in enumerate(scores))
    assert covered / 6 >= 1 - alpha - 1e-12
    if len(set(scores)) == 6:
        assert covered == math.ceil(6 * (1 - alpha) - 1e-9)
        assert covered / 6 <= 1 - alpha + 1 / 6


def test_interval_is_the_law_of_order_statistics() -> None:
    """The k-th of n uniform scores is at most u where at least k of them are: binomial, no Beta function."""
    n, alpha = 50, 0.1
    low, high = coverage_interval(n, alpha, level=0.9)
    k = math.ceil(51 * 0.9 - 1e-9)

    def at_most(u: float) -> float:
        return sum(math.comb(n, j) * u**j * (1 - u) ** (n - j) for j in range(k, n + 1))

    assert at_most(low) == pytest.approx(0.05, abs=1e-9)
    assert at_most(high) == pytest.approx(0.95, abs=1e-9)
    assert coverage_interval(8, 0.1) == (1.0, 1.0)


def test_groups_have_their_own_thresholds_and_say_which_are_too_small(caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.arange(12.0).double()
    keys = ["a"] * 9 + ["b"] * 3
    with caplog.at_level(logging.WARNING):
        found = Cutoffs.of(lambda rows: conformal_quantile(scores[rows], 0.1), keys, 0.1, ["a", "b", "c"])
    assert found == {"a": Cutoff(8.0, 9), "b": Cutoff(math.inf, 3), "c": Cutoff(math.inf, 0)}
    assert "['b', 'c'] (2 of 3 groups)" in caplog.text and "it takes 9" in caplog.text
    assert found.thresholds(["c", "a", "unseen"]).tolist() == [math.inf, 8.0, math.inf]
    assert Cutoffs.from_list(found.to_list()) == found


@pytest.mark.protects("ties_in_any_order")
def test_p_values_count_and_are_super_uniform_for_every_bag() -> None:
    """Over all ways to take the new one out of n + 1 scores: P(p <= t) <= t, and p counts by the definition."""
    for bag in ([0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0], [7.0] * 5):
        found = []
        for i, s in enumerate(bag):
            rest = [*bag[:i], *bag[i + 1 :]]
            p = float(conformal_p_values(rest, [s]))
            assert p == (1 + sum(c >= s for c in rest)) / 5
            # flagging at alpha is what the threshold of `ood` does
            assert (p <= 0.2) == (s > conformal_quantile(rest, 0.2))
            found.append(p)
        assert all(sum(p <= t + 1e-12 for p in found) <= 5 * t + 1e-9 for t in (0.2, 0.4, 0.5, 0.6, 0.8, 1.0))


def test_smoothed_p_values_are_uniform_with_ties() -> None:
    """P(p <= t) = t: 5,000 p-values of scores 0, 1, 2; a mean of indicators of deviation <= 0.0071, taken 4 times."""
    rng = np.random.default_rng(0)
    bags = rng.integers(0, 3, (5_000, 6)).astype(float)
    p = torch.cat([conformal_p_values(bag[1:], bag[:1], smoothed=True, seed=i) for i, bag in enumerate(bags)])
    for t in (0.1, 0.25, 0.5, 0.9):
        assert float((p <= t).double().mean()) == pytest.approx(t, abs=0.028)
    assert float(p.max()) <= 1


def test_false_discoveries_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    for m in (1, 2, 7, 30):
        p = np.concatenate([rng.random(m // 2) * 0.05, rng.random(m - m // 2)])
        ordered = np.sort(p)
        most = max((i for i in range(1, m + 1) if ordered[i - 1] <= 0.1 * i / m), default=0)
        flags = benjamini_hochberg(p, 0.1)
        assert int(flags.sum()) == most
        assert set(p[flags.numpy()]) == set(ordered[:most])
    assert benjamini_hochberg([], 0.1).shape == (0,)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: conformal_quantile([1.0, math.nan], 0.1), "`scores` must be"),
        (lambda: conformal_quantile([[1.0]], 0.1), "`scores` must be"),
        (lambda: conformal_quantile("12", 0.1), "`scores` must be numbers"),
        (lambda: conformal_quantile([1.0], 0.0), "`alpha` is the share of misses"),
        (lambda: conformal_quantile([1.0], True), "`alpha` is the share of misses"),
        (lambda: coverage_interval(-1), "`num_rows`"),
        (lambda: coverage_interval(10, level=1.5), "`level`"),
        (lambda: conformal_p_values([], [1.0]), "`calibration_scores` must be"),
        (lambda: conformal_p_values([1.0], [math.nan]), "`scores` must be"),
        (lambda: conformal_p_values([1.0], [1.0], seed=-1), "`seed`"),
        (lambda: benjamini_hochberg([1.2], 0.1), r"`p_values` must lie in \[0, 1\]"),
        (lambda: benjamini_hochberg([0.2], 1), "`alpha` is"),
        (lambda: group_keys("ab", 2), "`groups` must be one group per row"),
        (lambda: group_keys([1], 2), "`groups` must be one group per row, 2"),
        (lambda: group_keys([1.5, None], 2), "`groups` must be strings or whole numbers"),
        (lambda: Cutoffs.from_list([["a", 1.0]]), "`cutoffs` must be a list"),
    ],
)
def test_bad_input(call: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
