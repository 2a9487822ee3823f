"""What a run leaves behind: a table on the screen, results.json, predictions.csv and one figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bayeformers.reports import ClassPredictions, comparison_figure, format_table, save_figure
from examples.glue.data import GlueData
from examples.glue.evaluation import ALL, BASELINE, BySet, group_masks

FIGURE = "uncertainty.png"
GROUPS_OF_THE_GRAMMAR = (
    "Top panels: all test inputs, clean and noisy.\nclean: the grammar decides the label.  "
    "noisy: a quarter of the labels are flipped.  shifted: constructions and words unseen in training."
)
ENTROPIES = ("entropy", "aleatoric", "epistemic", "total_std", "aleatoric_std", "epistemic_std")


def format_results(results: Mapping[str, Any]) -> str:
    """The tables: what was chosen, scores by group, what the uncertainty is made of, telling shifted inputs."""
    methods = results["methods"]
    groups = {group: None for report in methods.values() for group in report["groups"]}
    parts = [_chosen_table(results)] if results["chosen"] else []
    for group in groups:
        rows = {name: _without(report["groups"][group], ENTROPIES) for name, report in methods.items()}
        if any(rows.values()):
            parts.append(format_table(rows, corner=_heading(group)))
        intervals = {name: report["intervals"].get(group) for name, report in methods.items()}
        if any(intervals.values()):
            parts.append(format_table({n: _ends(of or {}) for n, of in intervals.items()}, corner=INTERVALS))
    split = {name: report for name, report in methods.items() if name != BASELINE}
    parts.append(format_table(_entropy_rows(split, list(groups)), corner="uncertainty (means per group)"))
    if any("ood_auroc" in report for report in split.values()):
        rows = {name: report["ood_auroc"] for name, report in split.items()}
        parts.append(format_table(rows, corner="AUROC of telling shifted inputs, by"))
    return "\n\n".join(parts)


INTERVALS = "95 % intervals (bootstrap over inputs)"


def _chosen_table(results: Mapping[str, Any]) -> str:
    """T, delta or tau of each method, how it was found, and what speaks against it."""
    held_out = results["held_out"]
    source = held_out["file"] or "held out"
    if held_out["split"] is not None and held_out["file"] is None:
        source += f" by seed {held_out['split']['seed']}"
    rows = {name: {key: _number(key, value) for key, value in of.items() if key != "beware"} for name, of in
            results["chosen"].items()}  # fmt: skip
    lines = [format_table(rows, corner=f"chosen by {held_out['rows']} rows {source}")]
    for name, of in results["chosen"].items():
        if of.get("beware"):
            lines.append(f"{name}: {'; '.join(of['beware'])}.\n  Its aleatoric and epistemic parts below mean nothing.")
    return "\n".join(lines)


def _number(key: str, value: Any) -> str | float:
    if isinstance(value, Mapping):  # tau by layer
        return f"{min(value.values()):.3g}..{max(value.values()):.3g}"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if key in ("gamma", "N C") else f"{value:.4g}"


def _ends(intervals: Mapping[str, Mapping[str, float] | None]) -> dict[str, str | None]:
    return {
        name: None if ends is None else f"[{ends['low']:.3f}, {ends['high']:.3f}]" for name, ends in intervals.items()
    }


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
    """One row per reported input: its set, group, text and label; then each method's prediction, by the label's name,
    whether it is right, and its probabilities and uncertainties."""
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
    columns |= {column: _column(split, column) for column in own}
    names, labels = data.task.label_names, _column(split, "label")
    columns["label"] = [names[label] if names and label != "" else label for label in labels]
    for method, predictions in methods.items():
        prefix = method.replace(" + ", "+").replace(", ", "_").replace(" ", "_")
        if isinstance(predictions, ClassPredictions):
            decided = predictions.probs.argmax(1)
            columns[f"{prefix}:predicted"] = [names[index] if names else int(index) for index in decided]
            columns[f"{prefix}:right"] = ["" if y == "" else int(y == d) for y, d in zip(labels, decided, strict=True)]
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


def write_figure(
    path: Path, data: GlueData, methods: Mapping[str, BySet], caveats: Mapping[str, Sequence[str]] | None = None
) -> bool:
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
        caveats=caveats,
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
