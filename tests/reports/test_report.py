"""The numbers of a report, and how they are written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bayeformers import metrics
from bayeformers.reports import (
    ClassPredictions,
    RegressionPredictions,
    bootstrap_intervals,
    classification_report,
    format_table,
    majority_predictions,
    ood_report,
    regression_report,
    write_json,
)


def test_entropies_add_up() -> None:
    rng = np.random.default_rng(0)
    draws = rng.dirichlet(np.ones(3), (8, 50))
    mean = draws.mean(0)
    total = -(mean * np.log(mean)).sum(1)
    expected = -(draws * np.log(draws)).sum(2).mean(0)
    predictions = ClassPredictions(mean, total - expected)
    np.testing.assert_allclose(predictions.total, total)
    np.testing.assert_allclose(predictions.aleatoric, expected)


def test_zero_probabilities_have_an_entropy() -> None:
    assert ClassPredictions(np.array([[1.0, 0.0]])).total.tolist() == [0.0]


def test_a_point_estimate_has_no_epistemic_score() -> None:
    point = ClassPredictions(np.array([[0.9, 0.1], [0.6, 0.4]]))
    assert set(ood_report(point, point)) == {"entropy", "max_probability"}
    assert classification_report(point)["epistemic"] == 0.0


def test_unlabelled_predictions_report_uncertainty_only() -> None:
    point = ClassPredictions(np.array([[0.9, 0.1]]))
    assert set(classification_report(point)) == {"entropy", "aleatoric", "epistemic"}


def test_regression_nll_is_that_of_the_gaussian() -> None:
    predictions = RegressionPredictions(np.array([0.0, 1.0]), np.array(1.0), np.array([3.0, 0.0]))
    expected = [0.5 * math.log(2 * math.pi * 4) + 4 / 8, 0.5 * math.log(2 * math.pi) + 0.5]
    assert regression_report(predictions, [2.0, 2.0])["nll"] == pytest.approx(np.mean(expected))
    assert predictions[np.array([True, False])].total.tolist() == [4.0]


def test_table_leaves_gaps_where_there_is_no_value() -> None:
    table = format_table({"a": {"x": 1.0}, "b": {"y": math.nan, "x": None}})
    assert table.splitlines()[-1].split() == ["b", "-", "-"]


def test_json_is_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": np.float32(0.5), "b": [math.nan, np.int64(2)], "c": np.arange(2)})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": 0.5, "b": [None, 2], "c": [0, 1]}


def test_error_auroc_is_that_of_the_metrics_and_none_without_errors() -> None:
    rng = np.random.default_rng(0)
    found, labels = ClassPredictions(rng.dirichlet(np.ones(3), 50)), rng.integers(3, size=50)
    expected = metrics.error_auroc(found.probs.max(1), found.probs.argmax(1) != labels)
    assert classification_report(found, labels)["error_auroc"] == expected
    assert classification_report(found, found.probs.argmax(1))["error_auroc"] is None


def test_intervals_are_those_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    found, labels = ClassPredictions(rng.dirichlet(np.ones(2), 40)), rng.integers(2, size=40)
    intervals = bootstrap_intervals(found, labels, num_resamples=50)
    assert list(intervals) == ["accuracy", "nll", "ece", "error_auroc"]
    expected = metrics.bootstrap_ci(metrics.negative_log_likelihood, found.probs, labels, num_resamples=50)
    assert intervals["nll"] == pytest.approx({"low": expected.low, "high": expected.high})
    assert bootstrap_intervals(found, found.probs.argmax(1), num_resamples=50)["error_auroc"] is None
    numbers = RegressionPredictions(np.arange(9.0), np.array(1.0))
    assert list(bootstrap_intervals(numbers, np.zeros(9), num_resamples=20)) == ["rmse", "nll"]


def test_the_majority_says_the_training_frequencies() -> None:
    """Its NLL on the labels it counted is their entropy."""
    labels = np.array([0, 1, 1, 1])
    found = majority_predictions(labels, 3, 4)
    np.testing.assert_allclose(found.probs, np.tile([0.25, 0.75, 0], (4, 1)))
    assert classification_report(found, labels)["nll"] == pytest.approx(found.total[0])


def test_a_table_takes_text_beside_numbers() -> None:
    table = format_table({"a": {"x": 1.0, "why": "holdout, at the grid's end"}, "b": {"x": 2.0}}).splitlines()
    assert table[2].endswith("holdout, at the grid's end") and table[3].split() == ["b", "2.000", "-"]
    assert len({len(line) for line in table}) == 1
