"""Methods side by side: what is reported of which rows, and what the files hold."""

import csv
from pathlib import Path

import numpy as np
import pytest

from bayeformers.reports import ClassPredictions, Comparison, RegressionPredictions, ReportedSet, recalibrate, tempered


@pytest.fixture
def comparison() -> Comparison:
    probs = np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    sets = {
        "test": ReportedSet(4, [0, 1, 1, 1], groups=["b", "a", "a", "b"], columns={"text": ["p", "q", "r", "s"]}),
        "shifted": ReportedSet(2),
    }
    found = Comparison(sets, label_names=("no", "yes"))
    point = {"test": ClassPredictions(probs), "shifted": ClassPredictions(np.full((2, 2), 0.5))}
    drawn = {name: ClassPredictions(of.probs, np.full(len(of.probs), 0.01)) for name, of in point.items()}
    found.add("majority", point, baseline=True)
    found.add("point", point, chosen={"T": 1.25})
    found.add("drawn, all", drawn, chosen={"delta": 0.4, "beware": ["it is the prior's"]})
    return found


def test_groups_and_sets_are_reported_apart(comparison: Comparison) -> None:
    report = comparison.reports()["drawn, all"]
    accuracies = {name: numbers.get("accuracy") for name, numbers in report["groups"].items()}
    assert accuracies == {"in-domain": 0.75, "a": 0.5, "b": 1.0, "shifted": None}
    assert set(report["intervals"]) == {"in-domain"}
    assert report["ood_auroc"]["entropy"] == 1.0 and report["ood_auroc"]["epistemic"] == 0.5


def test_tables_hold_choices_warnings_and_baselines(comparison: Comparison) -> None:
    chosen, *tables = comparison.tables(comparison.reports(), source="4 rows").split("\n\n")
    assert chosen.startswith("chosen by 4 rows") and "drawn, all: it is the prior's." in chosen
    assert [table.split("  ")[0] for table in tables] == [
        "in-domain test set", "95 % intervals (bootstrap over inputs)", "a inputs", "b inputs",
        "uncertainty (means per group)", "AUROC of telling shifted inputs, by",
    ]  # fmt: skip
    assert "majority" in tables[0] and "majority" not in tables[-2]


def test_files_have_a_row_for_each_input(comparison: Comparison, tmp_path: Path) -> None:
    figure = comparison.figure(title="?")
    assert comparison.write(tmp_path, {"x": 1}, figure, figure_name="f.png") == [
        "results.json",
        "predictions.csv",
        "f.png",
    ]
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    assert [row["set"] for row in rows] == 4 * ["test"] + 2 * ["shifted"]
    assert [row["label"] for row in rows] == ["no", "yes", "yes", "yes", "", ""]
    assert rows[2]["point:predicted"] == "no" and rows[2]["point:right"] == "0" and rows[4]["point:right"] == ""
    assert rows[0]["drawn_all:p_no"] == "0.9" and not any(name.startswith("majority") for name in rows[0])


def test_a_regression_is_recalibrated_by_its_noise() -> None:
    point = {"validation": RegressionPredictions(np.array([1.0, 3.0]), np.array(9.0))}
    found = recalibrate(point, [2.0, 2.0])
    assert (found.name, found.value) == ("fitted_noise", 1.0)
    assert found.predictions["validation"].total.tolist() == [1.0, 1.0]


def test_a_temperature_scales_logits() -> None:
    logits = np.log([[0.8, 0.2]])
    powers = np.exp(logits / 0.5)
    np.testing.assert_allclose(tempered(np.exp(logits), 0.5), powers / powers.sum())
