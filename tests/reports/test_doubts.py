"""Scores of doubt: the threshold against all thresholds, the report against its definitions, what has no value."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bayeformers import metrics
from bayeformers.reports import doubt_gains, doubt_report, refusal_threshold


def answers(number: int = 60) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    wrong = rng.random(number) < 0.4
    scores = {"good": wrong + rng.normal(size=number), "poor": 0.2 * wrong + rng.normal(size=number)}
    return scores, {"good": wrong, "poor": wrong}


@pytest.mark.parametrize("target", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_threshold_is_the_largest_that_reaches_the_target(target: float) -> None:
    scores, wrong = answers()
    score, errors = scores["good"], wrong["good"]
    fit = [limit for limit in score if 1 - errors[score <= limit].mean() >= target - 1e-12]
    assert refusal_threshold(score, errors, target) == (max(fit) if fit else -math.inf)


def test_threshold_where_all_or_none_are_right() -> None:
    assert refusal_threshold([0.3, 0.1, 0.2], [0, 0, 0], 0.9) == 0.3
    assert refusal_threshold([0.3, 0.1, 0.2], [1, 1, 1], 0.9) == -math.inf


def test_report_and_gains_by_their_definitions() -> None:
    scores, wrong = answers()
    report = doubt_report(scores, wrong, {"good": 0.5, "poor": -math.inf}, num_resamples=200)
    given = scores["good"] <= 0.5
    assert report["good"]["auroc"] == metrics.ood_auroc(scores["good"], wrong["good"])
    assert report["good"]["answered"] == given.mean()
    assert report["good"]["accuracy_of_answered"] == pytest.approx(1 - wrong["good"][given].mean())
    assert report["poor"]["answered"] == 0 and report["poor"]["accuracy_of_answered"] is None
    gains = doubt_gains(scores, wrong, "good", num_resamples=200)
    assert list(gains) == ["poor"]
    assert gains["poor"]["gain"] == pytest.approx(report["good"]["auroc"] - report["poor"]["auroc"])
    low, high = map(float, str(gains["poor"]["interval"]).strip("[]").split(","))
    assert low < float(gains["poor"]["gain"]) < high


def test_without_a_wrong_answer_there_is_no_auroc() -> None:
    scores, wrong = {"one": [0.1, 0.2], "two": [0.2, 0.1]}, {"one": [0, 0], "two": [0, 0]}
    report = doubt_report(scores, wrong, {"one": 1.0, "two": 1.0})
    assert report["one"] == {
        "auroc": None, "interval": None, "aurc": 0.0, "answered": 1.0, "accuracy_of_answered": 1.0,
    }  # fmt: skip
    assert doubt_gains(scores, wrong, "one") == {"two": {"gain": None, "interval": None}}


def test_unknown_reference() -> None:
    with pytest.raises(ValueError, match="`reference` must be one of .*, got 'best'"):
        doubt_gains(*answers(), "best")
