"""The finite-sample statement of a threshold, proven by enumeration."""

import itertools
import math

import pytest
import torch

from bayeformers.ood.thresholds import false_alarm_interval, threshold


@pytest.mark.parametrize("scores", [[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 1.0, 1.0, 4.0], [2.0] * 5])
@pytest.mark.parametrize("rate", [0.2, 0.25, 0.4, 0.6, 0.99])
def test_rate_holds_over_all_ways_to_leave_one_out(scores: list[float], rate: float) -> None:
    """n + 1 exchangeable scores: any of them is as likely to be the new one."""
    alarms = sum(new > threshold([*scores[:i], *scores[i + 1 :]], rate) for i, new in enumerate(scores))
    assert alarms / 5 <= rate + 1e-12
    if len(set(scores)) == 5:  # without ties: never below alpha - 1/(n + 1)
        assert alarms == math.floor(5 * rate + 1e-9)


def test_flags_do_not_depend_on_the_order() -> None:
    found = {threshold(list(order), 0.4) for order in itertools.permutations([3.0, 1.0, 1.0, 2.0])}
    assert found == {2.0}


def test_interval_is_the_law_of_order_statistics() -> None:
    """P(rate <= u) of the k-th of n uniform scores is binomial: at least k of n lie below 1 - u or not."""
    n, rate = 99, 0.05
    low, high = false_alarm_interval(n, rate, level=0.9)
    k = math.ceil((n + 1) * (1 - rate) - 1e-9)

    def below(u: float) -> float:  # rate <= u iff the k-th score >= 1 - u iff fewer than k lie below 1 - u
        return sum(math.comb(n, j) * (1 - u) ** j * u ** (n - j) for j in range(k))

    assert below(low) == pytest.approx(0.05, abs=1e-9)
    assert below(high) == pytest.approx(0.95, abs=1e-9)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan"), "0.05", True, None])
def test_a_rate_out_of_range_is_refused(rate: object) -> None:
    with pytest.raises(ValueError, match="`false_alarm_rate` must be above 0"):
        threshold([0.0] * 50, rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("scores", [[], [[0.0]], [float("nan")] * 30, "abc", None, torch.tensor(1.0)])
def test_scores_that_are_none_are_refused(scores: object) -> None:
    with pytest.raises(ValueError, match="`scores` must be"):
        threshold(scores)  # type: ignore[arg-type]


def test_too_few_rows_for_the_rate_are_refused() -> None:
    assert threshold(list(range(19)), 0.05) == 18
    with pytest.raises(ValueError, match="with fewer than 19"):
        threshold(list(range(18)), 0.05)
    with pytest.raises(ValueError, match="`num_rows`"):
        false_alarm_interval(0)
    with pytest.raises(ValueError, match="`level`"):
        false_alarm_interval(100, level=0.0)
