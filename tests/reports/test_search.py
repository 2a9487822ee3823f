"""What a search found, in numbers."""

import pytest

from bayeformers.reports.search import paired_difference, verdict


def test_paired_difference_leaves_out_what_a_report_lacks() -> None:
    first = [{"nll": 1.0, "ece": None}, {"nll": 3.0, "ece": 0.5}]
    second = [{"nll": 0.5, "ece": 0.25}, {"nll": 1.5, "ece": 0.25}]
    assert paired_difference(first, second) == {"nll": {"mean": 1.0, "standard_error": 0.5}}


@pytest.mark.parametrize(
    ("mean", "error", "said"),
    [(-0.02, 0.004, "found is better"), (0.02, 0.004, "found is worse"), (-0.02, 0.02, "the defaults hold")],
)
def test_a_difference_counts_beyond_two_standard_errors(mean: float, error: float, said: str) -> None:
    assert said in verdict({"mean": mean, "standard_error": error})
