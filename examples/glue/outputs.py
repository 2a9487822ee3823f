"""What a run leaves behind: a table on the screen, results.json, predictions.csv and one figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bayeformers.plots import comparison_figure, save_figure
from bayeformers.report import ClassPredictions, format_table
from examples.glue.data import GlueData
from examples.glue.evaluation import ALL, BySet, group_masks

FIGURE = "uncertainty.png"
GROUPS_OF_THE_GRAMMAR = (
    "Top panels: all test inputs, clean and noisy.\nclean: the grammar decides the label.  "
    "noisy: a quarter of the labels are flipped.  shifted: constructions and words unseen in training."
)
ENTROPIES = ("entropy", "aleatoric", "epistemic", "total_std", "aleatoric_std", "epistemic_std")


def format_results(results: Mapping[str, Any]) -> str:
    """The tables: scores by group, what the uncertainty is made of, telling shifted inputs."""
    methods = results["methods"]
    groups = {group: None for report in methods.values() for group in report["groups"]}
    parts = []
    for group in groups:
        rows = {name: _without(report["groups"][group], ENTROPIES) for name, report in methods.items()}
        if any(rows.values()):
            parts.append(format_table(rows, corner=_heading(group)))
    parts.append(format_table(_entropy_rows(methods, list(groups)), corner="uncertainty (means per group)"))
    if any("ood_auroc" in report for report in methods.values()):
        rows = {name: report["ood_auroc"] for name, report in methods.items()}
        parts.append(format_table(rows, corner="AUROC of telling shifted inputs, by"))
    return "\n\n".join(parts)


def _heading(group: str) -> str:
    return "in-domain test set" if group == ALL else f"{group} inputs"


def _without(report: Mapping[str, float | None], names: tuple[str, ...]) -> dict[str, float | None]:
    return {name: value for name, value in report.items() if name not in names}


def _entropy_rows(methods: Mapping[str, Any], groups: list[str]) -> dict[str, dict[str, float | None]]:
    shown = [group for group in groups if group != ALL or len(groups) <= 2]
    return {
        f"{method}: {group}": {
            name: report["groups"][group].get(name) for name in ENTROPIES if name in report["groups"][group]
        }
        for method, report in methods.items()
        for group in shown
    }


def write_predictions(path: Path, data: GlueData, methods: Mapping[str, BySet]) -> None:
    """One row per reported input: its set, group, text and label, then each method's prediction and uncertainties."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for name, split in data.reported.items():
            columns = _columns(data, split, name, {method: sets[name] for method, sets in methods.items()})
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                if writer is None:
                    writer = csv.DictWriter(file, fieldnames=list(row))
                    writer.writeheader()
                writer.writerow(row)


def _columns(data: GlueData, split: Any, name: str, methods: Mapping[str, Any]) -> dict[str, list[Any]]:
    own = [column for column in ("group", "construction", *data.task.columns) if column in data.test.column_names]
    columns: dict[str, list[Any]] = {"set": [name] * len(split)}
    columns |= {column: _column(split, column) for column in (*own, "label")}
    for method, predictions in methods.items():
        prefix = method.replace(" + ", "+").replace(" ", "_")
        if isinstance(predictions, ClassPredictions):
            values = {f"p_{label}": predictions.probs[:, i] for i, label in enumerate(data.task.label_names)}
            values |= {"entropy": predictions.total, "aleatoric": predictions.aleatoric}
        else:
            values = {"mean": predictions.mean, "variance": predictions.total}
        if predictions.epistemic is not None:
            values["epistemic"] = predictions.epistemic
        columns |= {f"{prefix}:{key}": [f"{value:.6g}" for value in column] for key, column in values.items()}
    return columns


def _column(split: Any, column: str) -> list[Any]:
    return list(split[column]) if column in split.column_names else [""] * len(split)


def write_figure(path: Path, data: GlueData, methods: Mapping[str, BySet]) -> bool:
    """All methods compared, each posterior taken apart; of a classification with a posterior, else nothing."""
    test = {name: sets["test"] for name, sets in methods.items()}
    posteriors = [name for name, predictions in test.items() if predictions.epistemic is not None]
    if data.task.is_regression or not posteriors:
        return False
    figure = comparison_figure(
        test,
        np.asarray(data.test["label"]),
        {name: _by_group(methods[name], data) for name in posteriors},
        title=f"How sure is it, and why? {_describe(data)}",
        caption=GROUPS_OF_THE_GRAMMAR if data.flip_rate is not None else "",
        aleatoric_reference=_true_entropy(data),
    )
    save_figure(figure, path)
    return True


def _by_group(predictions: BySet, data: GlueData) -> dict[str, Any]:
    masks = group_masks(data)
    return {group: predictions[name][mask] for group, (name, mask) in masks.items() if group != ALL or len(masks) <= 2}


def _describe(data: GlueData) -> str:
    shifted = "" if data.shifted is None else f", {len(data.shifted)} shifted inputs"
    return f"Task {data.task.name}: {len(data.test)} test inputs{shifted}"


def _true_entropy(data: GlueData) -> tuple[float, str] | None:
    if data.flip_rate is None:
        return None
    entropy = -sum(p * np.log(p) for p in (data.flip_rate, 1 - data.flip_rate))
    return float(entropy), f"truth for noisy inputs ({entropy:.3f})"
