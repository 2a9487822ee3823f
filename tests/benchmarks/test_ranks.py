"""Mean ranks, Friedman's test and Nemenyi's critical difference against published numbers and by hand."""

import math

import pytest
from scipy.stats import chi2

from benchmarks.leaderboard.ranks import critical_difference, rank


# Demšar 2006, table 5 a: q at the 5 % level, two-tailed Nemenyi test
@pytest.mark.parametrize(("num_methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_is_of_the_published_quantiles(num_methods: int, q: float) -> None:
    expected = q * math.sqrt(num_methods * (num_methods + 1) / (6 * 12))
    assert critical_difference(num_methods, 12) == pytest.approx(expected, rel=5e-4)  # q has three decimals


def test_ranks_and_friedman_by_hand() -> None:
    tasks = ["t1", "t2", "t3", "t4"]
    values = {"worst": [4, 9, 7, 8], "best": [1, 2, 3, 1], "middle": [2, 2, 4, 5]}
    found = rank(values, tasks)
    assert found is not None
    assert found.ranks == {"best": 4.5 / 4, "middle": 7.5 / 4, "worst": 3.0} and list(found.ranks)[0] == "best"
    # 12 / (N k (k + 1)) sum R^2 - 3 N (k + 1), corrected for the one tie of two by 1 - (2^3 - 2) / (N k (k^2 - 1))
    statistic = (12 / (4 * 3 * 4) * (4.5**2 + 7.5**2 + 12**2) - 3 * 4 * 4) / (1 - 6 / (4 * 3 * 8))
    assert found.p_value == pytest.approx(chi2.sf(statistic, df=2))
    assert found.is_informative and found.groups == [("best", "middle"), ("middle", "worst")]


def test_higher_may_be_better() -> None:
    found = rank({"a": [1, 1], "b": [2, 2], "c": [3, 3]}, ["x", "y"], lower_is_better=False)
    assert found is not None and list(found.ranks) == ["c", "b", "a"]


def test_too_few_tasks_are_said_to_be() -> None:
    found = rank({name: [float(i), float(i)] for i, name in enumerate("abcdefg")}, ["x", "y"])
    assert found is not None and not found.is_informative and found.difference > 6
    assert critical_difference(7, found.least_tasks) < 6 <= critical_difference(7, found.least_tasks - 1)


def test_nothing_to_rank() -> None:
    assert rank({"a": [1, 2], "b": [2, 1]}, ["x", "y"]) is None
    assert rank({"a": [1], "b": [2], "c": [3]}, ["x"]) is None
    same = rank({"a": [1, 2], "b": [1, 2], "c": [1, 2]}, ["x", "y"])
    assert same is not None and math.isnan(same.p_value) and set(same.ranks.values()) == {2.0}


def test_a_missing_value_is_refused() -> None:
    with pytest.raises(ValueError, match="`values` of b must be one per task, got 1 for 2 tasks"):
        rank({"a": [1, 2], "b": [1], "c": [1, 2]}, ["x", "y"])
