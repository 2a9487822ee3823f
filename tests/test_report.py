"""The numbers of a report, and how they are written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bayeformers.report import (
    ClassPredictions,
    RegressionPredictions,
    classification_report,
    format_table,
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
