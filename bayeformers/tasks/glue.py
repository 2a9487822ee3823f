"""The GLUE tasks, one row each, and readers of their official TSV files.

GLUE: Wang et al. 2018 (arXiv 1804.07461). A split is a dictionary of columns, ready for `datasets.Dataset.from_dict`:
the task's text columns under the names that the hub's `nyu-mll/glue` gives them, and ``"label"``, an integer (the
position in `GlueTask.label_names`) or, for STS-B, a number from 0 to 5.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Split = dict[str, list[Any]]
MetricFunction = Callable[[ArrayLike, ArrayLike], float]


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of (N,) predicted integers that equal their labels, in [0, 1].

    >>> accuracy([1, 0, 1, 1], [1, 0, 0, 1])
    0.75
    """
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the harmonic mean of class 1's precision and recall, in [0, 1]; 0 where nothing is found.

    >>> round(f1([1, 0, 1, 1], [1, 0, 0, 1]), 3)
    0.8
    """
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews_correlation(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the correlation of predicted and true classes, in [-1, 1]; 0 if all predictions are the same.

    >>> round(matthews_correlation([1, 0, 1, 1], [1, 0, 0, 1]), 3)
    0.577
    """
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the linear correlation of (N,) predicted and true numbers, in [-1, 1]; 0 if either side is constant.

    >>> round(pearson([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]), 3)
    0.982
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Return the correlation of the ranks of (N,) predicted and true numbers; 0 if either side is constant.

    >>> round(spearman([1.0, 2.0, 4.0], [1.0, 2.0, 3.0]), 3)
    1.0
    """
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(measure: Callable[..., Any], predictions: ArrayLike, labels: ArrayLike) -> float:
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(measure(x, y)[0])


@dataclass(frozen=True, kw_only=True)
class TsvLayout:
    """Where a task's official files are and how they name their columns.

    ``columns`` are the TSV's names of the task's text columns, in the same order. A file without a header has
    its columns named by ``header``. ``shifted`` is a file whose rows are out of the training distribution; those among
    them that are in the validation file as well are taken out of it.
    """

    directory: str
    columns: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None
    validation: Mapping[str, str] = field(default_factory=lambda: {"validation": "dev.tsv"})
    shifted: str | None = None
    broken_share: float = 0.0
    """Rows with a wrong number of columns are an error beyond this share of the file; below, skipped with a warning."""

    @property
    def files(self) -> dict[str, str]:
        """The file of each labelled split."""
        shifted = {"shifted": self.shifted} if self.shifted else {}
        return {"train": "train.tsv", **self.validation, **shifted}


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """A row of `GLUE_TASKS`: what is read, how many outputs a model needs, how its predictions are scored.

    ``label_values`` are the labels as the TSV files write them, in the order of ``label_names`` (the hub's order).
    ``num_labels`` is 1 for a regression.
    """

    name: str
    columns: tuple[str, ...]
    label_names: tuple[str, ...] = ()
    label_values: tuple[str, ...] = ("0", "1")
    label_range: tuple[float, float] = (0.0, 5.0)
    metrics: tuple[MetricFunction, ...]
    tsv: TsvLayout

    @property
    def num_labels(self) -> int:
        """How many outputs a model needs: one for a regression."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the labels are numbers."""
        return not self.label_names

    def compute_metrics(self, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Return by name the task's official metrics of (N,) predicted classes, or numbers in a regression.

        >>> GLUE_TASKS["sst2"].compute_metrics([1, 0], [1, 1])
        {'accuracy': 0.5}
        """
        return {metric.__name__: metric(predictions, labels) for metric in self.metrics}

    def configure(self, config: Any) -> None:
        """Write the problem type and the label names into a transformers configuration.

        >>> from transformers import BertConfig
        >>> config = BertConfig(num_labels=2)
        >>> GLUE_TASKS["cola"].configure(config)
        >>> config.problem_type, config.id2label
        ('single_label_classification', {0: 'unacceptable', 1: 'acceptable'})
        """
        config.problem_type = "regression" if self.is_regression else "single_label_classification"
        if self.label_names:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: index for index, name in enumerate(self.label_names)}

    def parse_label(self, text: str) -> int | float:
        """Return the label that a TSV file writes as `text`: a position in ``label_names``; in a regression a number.

        Raises:
            ValueError: not one of ``label_values``; in a regression, not a number within ``label_range``.

        >>> GLUE_TASKS["rte"].parse_label("not_entailment"), GLUE_TASKS["stsb"].parse_label("4.75")
        (1, 4.75)
        """
        if not self.is_regression:
            if text not in self.label_values:
                raise ValueError(f"label {text!r} is not one of {', '.join(map(repr, self.label_values))}")
            return self.label_values.index(text)
        low, high = self.label_range
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"label {text!r} is not a number from {low:g} to {high:g}")
        return value


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MATCHED = {"validation_matched": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"}


def _task(name: str, directory: str, columns: tuple[str, ...], **row: Any) -> GlueTask:
    """A row; `tsv` holds what differs from "the same column names as on the hub, label in `label`, a header"."""
    layout = TsvLayout(**{"directory": directory, "columns": columns, "label": "label", **row.pop("tsv", {})})
    return GlueTask(name=name, columns=columns, tsv=layout, **row)


GLUE_TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        _task(
            "cola", "CoLA", ("sentence",), label_names=("unacceptable", "acceptable"), metrics=(matthews_correlation,),
            tsv={"header": ("source", "label", "mark", "sentence"), "shifted": "out_of_domain_dev.tsv"},
        ),
        _task("sst2", "SST-2", ("sentence",), label_names=("negative", "positive"), metrics=(accuracy,)),
        _task(
            "mrpc", "MRPC", _PAIR, label_names=("not_equivalent", "equivalent"), metrics=(accuracy, f1),
            tsv={"columns": ("#1 String", "#2 String"), "label": "Quality"},
        ),
        _task("stsb", "STS-B", _PAIR, metrics=(pearson, spearman), tsv={"label": "score"}),
        _task(
            "qqp", "QQP", ("question1", "question2"), label_names=("not_duplicate", "duplicate"),
            metrics=(accuracy, f1),
            # Two dozen of the official 364,000 rows are torn by line ends inside a question.
            tsv={"label": "is_duplicate", "broken_share": 1e-3},
        ),
        _task(
            "mnli", "MNLI", ("premise", "hypothesis"), label_names=("entailment", "neutral", "contradiction"),
            label_values=("entailment", "neutral", "contradiction"), metrics=(accuracy,),
            tsv={"columns": _PAIR, "label": "gold_label", "validation": _MATCHED},
        ),
        _task(
            "qnli", "QNLI", ("question", "sentence"), label_names=_ENTAILMENT, label_values=_ENTAILMENT,
            metrics=(accuracy,),
        ),
        _task("rte", "RTE", _PAIR, label_names=_ENTAILMENT, label_values=_ENTAILMENT, metrics=(accuracy,)),
        _task("wnli", "WNLI", _PAIR, label_names=_ENTAILMENT[::-1], metrics=(accuracy,)),
    )
}  # fmt: skip


def read_task(task: GlueTask, directory: str | PathLike[str]) -> dict[str, Split]:
    """Return by split the columns of `task`'s official labelled files in `directory`; a missing one is left out.

    Where there is a shifted file, its rows are taken out of the validation split.

    Raises:
        FileNotFoundError: `directory` does not exist, or has none of the task's files.
    """
    folder = _folder(directory)
    splits = [split for split, name in task.tsv.files.items() if (folder / name).is_file()]
    if not splits:
        raise FileNotFoundError(f"{folder} has none of {task.name}'s files: {', '.join(task.tsv.files.values())}.")
    return {split: read_split(task, folder, split) for split in splits}


def read_split(task: GlueTask, directory: str | PathLike[str], split: str) -> Split:
    """Return the columns of one labelled split; a malformed row, or a missing file, is an error that names it.

    Args:
        task: a row of `GLUE_TASKS`.
        directory: of its official files.
        split: ``train``, ``validation`` (MNLI: ``validation_matched``, ``validation_mismatched``) or ``shifted``.

    Raises:
        ValueError: the task has no such split.
    """
    folder, files = _folder(directory), task.tsv.files
    if split not in files:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, files))} for {task.name}, got {split!r}.")
    rows = read_tsv(task, folder / files[split])
    if split in task.tsv.validation and task.tsv.shifted and (folder / task.tsv.shifted).is_file():
        return _without(rows, read_tsv(task, folder / task.tsv.shifted))
    return rows


def read_tsv(task: GlueTask, path: str | PathLike[str], *, labelled: bool = True) -> Split:
    """Return the columns of one file in a task's official layout: tabs separate, quotation marks mean nothing.

    Args:
        task: a row of `GLUE_TASKS`.
        path: the file, in UTF-8; a byte-order mark is skipped.
        labelled: whether it has labels; test files have text columns alone.

    Raises:
        ValueError: a missing column, a row with another number of columns than the header, or a label outside the
            allowed set; the message names file and line.
    """
    path = _file(path)
    lines, needed = _lines(path), (*task.tsv.columns, *([task.tsv.label] if labelled else []))
    header = task.tsv.header or tuple(next(lines, (0, ""))[1].split("\t"))
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{path}, line 1: {task.name}'s column(s) {missing} are not in the header {list(header)}.")
    positions = [header.index(name) for name in needed]
    split: Split = {name: [] for name in (*task.columns, *(["label"] if labelled else []))}
    broken, number = [], 0
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) != len(header):
            expected = f"{len(header)} are expected ({list(header)})"
            broken.append(f"{path}, line {number}: {len(cells)} columns where {expected}.")
            continue
        values: list[Any] = [cells[position].strip() for position in positions]
        if labelled:
            values[-1] = _label(task, path, number, values[-1])
        for column, value in zip(split.values(), values, strict=True):
            column.append(value)
    if len(broken) > task.tsv.broken_share * number:
        raise ValueError(broken[0])
    if broken:
        warnings.warn(f"{len(broken)} malformed rows of {path} were skipped; the first: {broken[0]}", stacklevel=2)
    return split


def _folder(directory: str | PathLike[str]) -> Path:
    folder, needed = Path(directory), "It must hold the task's official TSV files, such as glue/CoLA."
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. {needed}")
    return folder


def _file(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        beside = sorted(other.name for other in path.parent.glob("*.tsv")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist. TSV files in its folder: {', '.join(beside) or 'none'}.")
    return path


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that hold something. Split at line feeds only: GLUE's texts contain other line separators."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if text := line.rstrip("\r\n"):
                    yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _label(task: GlueTask, path: Path, number: int, text: str) -> int | float:
    try:
        return task.parse_label(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}.") from None


def _without(rows: Split, others: Split) -> Split:
    """`rows` less one occurrence of each row of `others`."""
    remaining, kept = Counter(zip(*others.values(), strict=True)), []
    for row in zip(*rows.values(), strict=True):
        remaining[row] -= 1
        if remaining[row] < 0:
            kept.append(row)
    return {name: [row[i] for row in kept] for i, name in enumerate(rows)}
