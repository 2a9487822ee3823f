"""Predictions of several methods on the same inputs, side by side: numbers, tables, CSV rows and a figure."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .html.results import UNLABELLED, HtmlResults
from .plots import comparison_figure, save_figure
from .report import (
    ClassPredictions,
    RegressionPredictions,
    bootstrap_intervals,
    classification_report,
    format_table,
    ood_report,
    regression_report,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREADS = ("entropy", "aleatoric", "epistemic", "total_std", "aleatoric_std", "epistemic_std")
"""What a table of uncertainties holds; all other numbers of a report are scores."""
STANDARD = (ClassPredictions, RegressionPredictions)


@dataclass(frozen=True)
class ReportedSet:
    """N inputs that results are about.

    Attributes:
        size: N.
        labels: (N,); None where there are none.
        groups: (N,), the group of each input, for a report of each; None without.
        columns: of the CSV file, by name, N values each: what the inputs are.
    """

    size: int
    labels: ArrayLike | None = None
    groups: Sequence[str] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def standard_report(predictions: Any, labels: ArrayLike | None = None) -> dict[str, float | None]:
    """`classification_report` of `ClassPredictions`, else `regression_report`."""
    if isinstance(predictions, ClassPredictions):
        return classification_report(predictions, labels)
    return regression_report(predictions, labels)


def prediction_columns(
    predictions: Any, labels: Sequence[Any] | None, label_names: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """Return CSV columns of one method: its decision and whether it is right, or its mean; and its uncertainties.

    Args:
        predictions: on N inputs.
        labels: (N,) class numbers; None where there are none.
        label_names: of the classes; without them classes are numbers.
    """
    columns: dict[str, list[Any]] = {}
    values: dict[str, Any] = {"mean": getattr(predictions, "mean", None), "variance": predictions.total}
    if isinstance(predictions, ClassPredictions):
        decided = predictions.probs.argmax(1).tolist()
        columns["predicted"] = [label_names[index] if label_names else index for index in decided]
        truths = [None] * len(decided) if labels is None else labels
        columns["right"] = ["" if y is None else int(y == d) for y, d in zip(truths, decided, strict=True)]
        values = {f"p_{name}": predictions.probs[:, index] for index, name in enumerate(label_names)}
        values |= {"entropy": predictions.total, "aleatoric": predictions.aleatoric}
    if predictions.epistemic is not None:
        values["epistemic"] = predictions.epistemic
    return {**columns, **{name: [f"{value:.6g}" for value in column] for name, column in values.items()}}


class Comparison:
    """Methods are added one by one; reports, tables and files then hold all of them.

    Predictions are `ClassPredictions`, `RegressionPredictions`, or anything that is taken apart by a mask and that
    ``report`` and ``columns`` understand; only the first two have intervals and scores that tell sets apart.
    """

    def __init__(
        self,
        sets: Mapping[str, ReportedSet],
        *,
        label_names: Sequence[str] = (),
        report: Callable[[Any, Any], Mapping[str, float | None]] = standard_report,
        columns: Callable[[Any, Any, Sequence[str]], Mapping[str, list[Any]]] = prediction_columns,
        whole: str = "in-domain",
        noun: str = "inputs",
    ) -> None:
        """Say what results are about.

        Args:
            sets: by name; the first is the test set, which is also reported group by group.
            label_names: of the classes.
            report: numbers of predictions against the labels, which may be None.
            columns: CSV columns of predictions, labels and label names.
            whole: what tables call the whole test set.
            noun: what tables call the inputs.
        """
        self.sets, self.label_names, self.whole, self.noun = dict(sets), tuple(label_names), whole, noun
        self.report, self.columns = report, columns
        self.predictions: dict[str, Mapping[str, Any]] = {}
        self.baselines: set[str] = set()
        self.chosen: dict[str, dict[str, Any]] = {}

    def add(
        self,
        method: str,
        predictions: Mapping[str, Any],
        *,
        chosen: Mapping[str, Any] | None = None,
        baseline: bool = False,
    ) -> None:
        """Add a method.

        Args:
            method: its name in tables and files.
            predictions: on every set, by the set's name; more sets than those of the comparison do no harm.
            chosen: what held-out rows chose for it, such as ``{"T": 1.3}``; ``"beware"``, a list, says why its
                uncertainties should not be believed.
            baseline: whether it is a yardstick that tables alone hold, without uncertainties.
        """
        self.predictions[method] = predictions
        if baseline:
            self.baselines.add(method)
        if chosen:
            self.chosen[method] = dict(chosen)

    @property
    def methods(self) -> dict[str, Mapping[str, Any]]:
        """Predictions of every method but the baselines."""
        return {name: sets for name, sets in self.predictions.items() if name not in self.baselines}

    @property
    def test(self) -> str:
        """The name of the first set."""
        return next(iter(self.sets))

    def masks(self) -> dict[str, tuple[str, NDArray[np.bool_]]]:
        """Group -> (set, mask of its rows): the test set, its groups if there are several, every other set."""
        first, *others = self.sets
        names = np.asarray(self.sets[first].groups if self.sets[first].groups is not None else [])
        masks = {self.whole: (first, np.ones(self.sets[first].size, dtype=bool))}
        if len(groups := dict.fromkeys(sorted(names.tolist()))) > 1:
            masks |= {group: (first, names == group) for group in groups}
        return {**masks, **{name: (name, np.ones(self.sets[name].size, dtype=bool)) for name in others}}

    def reports(self) -> dict[str, dict[str, Any]]:
        """By method `report_of` it."""
        return {name: self.report_of(predictions) for name, predictions in self.predictions.items()}

    def report_of(self, predictions: Mapping[str, Any]) -> dict[str, Any]:
        """Return a report per group, ``intervals`` on whole sets, and ``ood_auroc`` of telling the second set apart.

        Of telling a further set: ``ood_auroc_`` and its name.
        """
        groups: dict[str, Any] = {}
        intervals: dict[str, Any] = {}
        for group, (name, mask) in self.masks().items():
            labels = self.sets[name].labels
            truth = None if labels is None else np.asarray(labels)[mask]
            groups[group] = dict(self.report(predictions[name][mask], truth))
            if truth is not None and mask.all() and isinstance(predictions[name], STANDARD):
                intervals[group] = bootstrap_intervals(predictions[name], truth)
        found: dict[str, Any] = {"groups": groups, "intervals": intervals}
        if hasattr(predictions[self.test], "ood_scores"):
            for key, name in self._told_apart():
                found[key] = ood_report(predictions[self.test], predictions[name])
        return found

    def _told_apart(self) -> list[tuple[str, str]]:
        """(key of a report, set) of each set but the first: the second's key has no name."""
        return [("ood_auroc" if i == 0 else f"ood_auroc_{name}", name) for i, name in enumerate(list(self.sets)[1:])]

    # -- text ---------------------------------------------------------------------------------------------------------

    def tables(self, reports: Mapping[str, Any], *, source: str = "") -> str:
        """What was chosen, and by which rows (``source``); scores by group; uncertainties; telling the second set."""
        parts = [self._chosen_table(source)] if self.chosen else []
        for group in self.masks():
            rows = {
                name: {key: value for key, value in report["groups"][group].items() if key not in SPREADS}
                for name, report in reports.items()
            }
            if any(rows.values()):
                kind = "test set" if group == self.whole else self.noun
                heading = group if group.endswith(self.noun) else f"{group} {kind}"
                parts.append(format_table(rows, corner=heading))
            ends = {name: _ends(report["intervals"].get(group) or {}) for name, report in reports.items()}
            if any(ends.values()):
                parts.append(format_table(ends, corner="95 % intervals (bootstrap over inputs)"))
        split = {name: report for name, report in reports.items() if name not in self.baselines}
        apart = {f"{name}: {of}": report["groups"][of] for name, report in split.items() for of in self._disjoint()}
        spreads = {heading: {key: row[key] for key in row if key in SPREADS} for heading, row in apart.items()}
        parts.append(format_table(spreads, corner="uncertainty (means per group)"))
        for key, shifted in self._told_apart():
            if told := {name: report[key] for name, report in split.items() if key in report}:
                parts.append(format_table(told, corner=f"AUROC of telling {shifted} {self.noun}, by"))
        return "\n\n".join(parts)

    def _chosen_table(self, source: str) -> str:
        rows = {
            name: {key: _number(key, value) for key, value in chosen.items() if key != "beware"}
            for name, chosen in self.chosen.items()
        }
        return "\n".join([format_table(rows, corner=f"chosen by {source}"), *self.warnings()])

    def warnings(self) -> list[str]:
        """A line for each method whose uncertainties should not be believed."""
        below = "Its aleatoric and epistemic parts below mean nothing."
        return [f"{name}: {'; '.join(reasons)}.\n  {below}" for name, reasons in self.caveats.items()]

    @property
    def caveats(self) -> dict[str, Sequence[str]]:
        """By method, why its uncertainties should not be believed, where there is something to say."""
        return {name: chosen["beware"] for name, chosen in self.chosen.items() if chosen.get("beware")}

    def _disjoint(self) -> list[str]:
        """The groups without the whole, where it has several."""
        groups = list(self.masks())
        return [group for group in groups if group != self.whole or len(groups) <= 2]

    # -- files --------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterable[dict[str, Any]]:
        """A row for each input: its set, columns and label; then each method's columns, prefixed by its name."""
        shared = list(self.sets[self.test].columns)
        for name, part in self.sets.items():
            labels = None if part.labels is None else np.asarray(part.labels).tolist()
            columns: dict[str, Sequence[Any]] = {"set": [name] * part.size}
            columns |= {column: part.columns.get(column, [""] * part.size) for column in shared}
            if any(each.labels is not None for each in self.sets.values()):
                names = self.label_names if labels and self.label_names else None
                columns["label"] = [names[label] if names else label for label in labels or [""] * part.size]
            for method, predictions in self.methods.items():
                own = self.columns(predictions[name], labels, self.label_names)
                columns |= {f"{csv_prefix(method)}:{key}": values for key, values in own.items()}
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def figure(self, *, title: str, **options: Any) -> Figure | None:
        """All methods, each posterior taken apart, by `comparison_figure`; None without a posterior of classes."""
        test = {name: sets[self.test] for name, sets in self.methods.items()}
        posteriors = [name for name, found in test.items() if getattr(found, "epistemic", None) is not None]
        if not posteriors or not all(isinstance(found, ClassPredictions) for found in test.values()):
            return None
        masks = self.masks()
        parts = {group: masks[group] for group in self._disjoint()}
        apart = {
            method: {group: self.methods[method][name][mask] for group, (name, mask) in parts.items()}
            for method in posteriors
        }
        labels = np.asarray(self.sets[self.test].labels)
        return comparison_figure(test, labels, apart, title=title, caveats=self.caveats, **options)

    def page(self, *, title: str, about: str = "", texts: Sequence[str] = ()) -> HtmlResults:
        """Return what `html` makes a page of: every set, of which all but the first stand apart.

        Args:
            title: of the page.
            about: a sentence on the inputs.
            texts: names of the columns that hold the inputs in words, if any.

        Raises:
            TypeError: predictions that are neither `ClassPredictions` nor `RegressionPredictions`.
        """
        found = {name: _joined([sets[key] for key in self.sets]) for name, sets in self.methods.items()}
        missing = np.nan if any(isinstance(of, RegressionPredictions) for of in found.values()) else UNLABELLED
        labels = [
            [missing] * part.size if part.labels is None else np.asarray(part.labels).tolist()
            for part in self.sets.values()
        ]
        groups = [
            list(part.groups) if part.groups is not None and name == self.test else [name] * part.size
            for name, part in self.sets.items()
        ]
        words = [
            " | ".join(str(part.columns[column][row]) for column in texts)
            for part in self.sets.values()
            for row in range(part.size)
        ]
        known = any(part.labels is not None for part in self.sets.values())
        return HtmlResults(
            found,
            labels=[label for of in labels for label in of] if known else None,
            texts=words if texts else None,
            class_names=self.label_names,
            groups=[group for of in groups for group in of],
            apart=[name for name in self.sets if name != self.test],
            caveats={name: "; ".join(reasons) for name, reasons in self.caveats.items()},
            title=title,
            about=about,
        )

    def write(
        self, folder: str | Path, results: Mapping[str, Any], figure: Figure | None, *, figure_name: str
    ) -> list[str]:
        """Return the names of the files that it writes: results.json, the CSV tables and the figure, if there is one.

        Args:
            folder: made if it does not exist.
            results: what results.json holds.
            figure: of `figure`, or another.
            figure_name: the file's name.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", results)
        tables = self.csv_tables()
        for name, rows in tables.items():
            write_rows(folder / name, rows)
        if figure is not None:
            save_figure(figure, folder / figure_name)
        return ["results.json", *tables, *([] if figure is None else [figure_name])]

    def csv_tables(self) -> dict[str, Iterable[Mapping[str, Any]]]:
        """The rows of each CSV file that `write` writes, by the file's name."""
        return {"predictions.csv": self.rows()}


def _joined(parts: Sequence[Any]) -> ClassPredictions | RegressionPredictions:
    """The predictions on several sets, one after the other."""
    if not all(isinstance(part, STANDARD) for part in parts):
        kinds = ", ".join(sorted({type(part).__name__ for part in parts}))
        raise TypeError(f"A page is of ClassPredictions or RegressionPredictions, got {kinds}.")
    rows = [len(part.total) for part in parts]
    has_epistemic = all(part.epistemic is not None for part in parts)
    epistemic = np.concatenate([part.epistemic for part in parts]) if has_epistemic else None
    if all(isinstance(part, ClassPredictions) for part in parts):
        return ClassPredictions(np.concatenate([part.probs for part in parts]), epistemic)
    aleatoric = [np.broadcast_to(part.aleatoric, (size,)) for part, size in zip(parts, rows, strict=True)]
    return RegressionPredictions(np.concatenate([part.mean for part in parts]), np.concatenate(aleatoric), epistemic)


def csv_prefix(method: str) -> str:
    """The name of a method in the header of a CSV file: ``a, b + c`` becomes ``a_b+c``."""
    return method.replace(" + ", "+").replace(", ", "_").replace(" ", "_")


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file whose header is the keys of the first row."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        for number, row in enumerate(rows):
            if number == 0:
                writer = csv.DictWriter(file, fieldnames=list(row))
                writer.writeheader()
            writer.writerow(row)


def _number(key: str, value: Any) -> str:
    if isinstance(value, Mapping):  # tau by layer
        return f"{min(value.values()):.3g}..{max(value.values()):.3g}"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if key in ("gamma", "N C") else f"{value:.4g}"


def _ends(intervals: Mapping[str, Mapping[str, float] | None]) -> dict[str, str | None]:
    return {
        name: None if ends is None else f"[{ends['low']:.3f}, {ends['high']:.3f}]" for name, ends in intervals.items()
    }
