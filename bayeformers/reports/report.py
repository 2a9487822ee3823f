"""Results as numbers, a text table and JSON: what is reported about a method's predictions, in one place."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeformers import metrics

Row = Mapping[str, float | str | None]
Interval = dict[str, float]
"""Ends ``low`` and ``high``."""


@dataclass(frozen=True)
class ClassPredictions:
    """One method's predictions on N examples: probabilities (N, C) and how their entropy divides, (N,) in nats.

    A point estimate leaves ``epistemic`` out: all of its entropy counts as aleatoric, as it cannot say otherwise.
    """

    probs: NDArray[np.floating[Any]]
    epistemic: NDArray[np.floating[Any]] | None = None

    @property
    def total(self) -> NDArray[np.floating[Any]]:
        """Entropy of the predicted probabilities, (N,)."""
        with np.errstate(divide="ignore"):
            total: NDArray[np.floating[Any]] = metrics.predictive_entropy(np.log(self.probs)[None])
        return total

    @property
    def aleatoric(self) -> NDArray[np.floating[Any]]:
        """Total less epistemic, (N,)."""
        total = self.total
        return total if self.epistemic is None else np.maximum(total - self.epistemic, 0.0)

    @property
    def confidence(self) -> NDArray[np.floating[Any]]:
        """Largest probability, (N,)."""
        confidence: NDArray[np.floating[Any]] = self.probs.max(1)
        return confidence

    def __getitem__(self, index: NDArray[Any]) -> "ClassPredictions":
        """The predictions on some of the examples, by a mask or by positions."""
        return ClassPredictions(self.probs[index], None if self.epistemic is None else self.epistemic[index])

    @property
    def ood_scores(self) -> dict[str, NDArray[np.floating[Any]]]:
        """What can tell unfamiliar inputs, (N,) each, larger for stranger ones."""
        epistemic = {} if self.epistemic is None else {"epistemic": self.epistemic}
        return {**epistemic, "entropy": self.total, "max_probability": -self.confidence}

    def errors(self, labels: ArrayLike) -> NDArray[np.floating[Any]]:
        """1 where the most probable class is not the label, else 0, (N,)."""
        wrong: NDArray[np.bool_] = self.probs.argmax(1) != np.asarray(labels)
        return wrong.astype(np.float64)


def classification_report(predictions: ClassPredictions, labels: ArrayLike | None = None) -> dict[str, float | None]:
    """Return scores against the labels (N,), if there are any, and mean entropies; None for a metric without a value.

    >>> predictions = ClassPredictions(np.array([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]))
    >>> {name: round(value, 2) for name, value in classification_report(predictions, [0, 1, 1]).items()}
    {'accuracy': 0.67, 'matthews': 0.5, 'nll': 0.46, 'ece': 0.33, 'brier': 0.31, 'aurc': 0.11, 'error_auroc': 1.0,
    'entropy': 0.54, 'aleatoric': 0.54, 'epistemic': 0.0}
    """
    from sklearn.metrics import matthews_corrcoef

    epistemic = 0.0 if predictions.epistemic is None else float(predictions.epistemic.mean())
    spread: dict[str, float | None] = {"entropy": float(predictions.total.mean())}
    spread |= {"aleatoric": float(predictions.aleatoric.mean()), "epistemic": epistemic}
    if labels is None:
        return spread
    probs, truth, errors = predictions.probs, np.asarray(labels), predictions.errors(labels)
    told_apart = 0 < errors.mean() < 1  # else all or none are wrong
    return {
        "accuracy": metrics.accuracy(probs, truth),
        "matthews": float(matthews_corrcoef(truth, probs.argmax(1))),
        "nll": metrics.negative_log_likelihood(probs, truth),
        "ece": metrics.expected_calibration_error(probs, truth),
        "brier": metrics.brier_score(probs, truth),
        "aurc": metrics.aurc(predictions.confidence, errors),
        "error_auroc": metrics.error_auroc(predictions.confidence, errors) if told_apart else None,
        **spread,
    }


def majority_predictions(labels: ArrayLike, num_classes: int, num_examples: int) -> ClassPredictions:
    """Return what one says without looking, (M, C): every input gets the frequencies of the training labels.

    Args:
        labels: of training, (N,).
        num_classes: C.
        num_examples: how many inputs are predicted, M.

    >>> majority_predictions([1, 1, 0, 1], 2, 1).probs
    array([[0.25, 0.75]])
    """
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes)
    return ClassPredictions(np.tile(counts / counts.sum(), (num_examples, 1)))


@dataclass(frozen=True)
class RegressionPredictions:
    """One method's predictions of N numbers: ``mean`` (N,), and variances, (N,) or scalars, in squared units."""

    mean: NDArray[np.floating[Any]]
    aleatoric: NDArray[np.floating[Any]]
    epistemic: NDArray[np.floating[Any]] | None = None

    @property
    def total(self) -> NDArray[np.floating[Any]]:
        """Predictive variance, (N,): aleatoric plus epistemic."""
        epistemic = 0.0 if self.epistemic is None else self.epistemic
        total: NDArray[np.floating[Any]] = np.broadcast_to(self.aleatoric + epistemic, self.mean.shape)
        return total

    def __getitem__(self, index: NDArray[Any]) -> "RegressionPredictions":
        """The predictions on some of the examples, by a mask or by positions."""
        aleatoric, epistemic = np.broadcast_to(self.aleatoric, self.mean.shape)[index], self.epistemic
        return RegressionPredictions(self.mean[index], aleatoric, None if epistemic is None else epistemic[index])

    @property
    def ood_scores(self) -> dict[str, NDArray[np.floating[Any]]]:
        """What can tell unfamiliar inputs, (N,) each, larger for stranger ones."""
        return {} if self.epistemic is None else {"epistemic": self.epistemic, "variance": self.total}


def regression_report(predictions: RegressionPredictions, labels: ArrayLike | None = None) -> dict[str, float | None]:
    """Return scores against the labels (N,), if there are any, and standard deviations (roots of mean variances).

    The NLL is that of a Gaussian with the predictive mean and variance; AURC ranks squared errors by that variance.

    >>> predictions = RegressionPredictions(np.array([1.0, 2.0]), np.array(0.25), np.array([0.0, 0.5]))
    >>> regression_report(predictions, [1.0, 3.0])["rmse"]
    0.7071
    """
    epistemic = 0.0 if predictions.epistemic is None else float(np.mean(predictions.epistemic))
    spread: dict[str, float | None] = {
        "total_std": float(np.sqrt(predictions.total.mean())),
        "aleatoric_std": float(np.sqrt(np.mean(predictions.aleatoric))),
        "epistemic_std": math.sqrt(epistemic),
    }
    if labels is None:
        return spread
    found = np.asarray(labels)
    scores: dict[str, float | None] = {"rmse": _rmse(predictions, found), "nll": _gaussian_nll(predictions, found)}
    return {**scores, "aurc": metrics.aurc(-predictions.total, (predictions.mean - found) ** 2), **spread}


def _rmse(predictions: RegressionPredictions, labels: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean((predictions.mean - labels) ** 2)))


def _gaussian_nll(predictions: RegressionPredictions, labels: NDArray[Any]) -> float:
    squared, total = (predictions.mean - labels) ** 2, predictions.total
    return float(np.mean(0.5 * (np.log(2 * np.pi * total) + squared / total)))


Predictions = TypeVar("Predictions", ClassPredictions, RegressionPredictions)

Score = Callable[[Any, NDArray[Any]], float]
_CLASS_SCORES: dict[str, Score] = {
    "accuracy": lambda found, labels: metrics.accuracy(found.probs, labels),
    "nll": lambda found, labels: metrics.negative_log_likelihood(found.probs, labels),
    "ece": lambda found, labels: metrics.expected_calibration_error(found.probs, labels),
    "error_auroc": lambda found, labels: metrics.error_auroc(found.confidence, found.errors(labels)),
}
_NUMBER_SCORES: dict[str, Score] = {"rmse": _rmse, "nll": _gaussian_nll}


def bootstrap_intervals(
    predictions: ClassPredictions | RegressionPredictions, labels: ArrayLike, *, num_resamples: int = 300, seed: int = 0
) -> dict[str, Interval | None]:
    """Return 95 % bootstrap intervals, over examples, of the main scores; None where too few resamples have a value.

    Args:
        predictions: on N examples.
        labels: (N,).
        num_resamples: how often the examples are drawn again.
        seed: of these draws.

    >>> intervals = bootstrap_intervals(ClassPredictions(np.array([[0.9, 0.1], [0.3, 0.7]] * 8)), [0, 0] * 8)
    >>> intervals["accuracy"]["low"] < 0.5 < intervals["accuracy"]["high"]
    True
    """
    scores = _CLASS_SCORES if isinstance(predictions, ClassPredictions) else _NUMBER_SCORES
    found = np.asarray(labels)
    return {name: _interval(score, predictions, found, num_resamples, seed) for name, score in scores.items()}


def _interval(score: Score, predictions: Any, labels: NDArray[Any], num_resamples: int, seed: int) -> Interval | None:
    rows, how = np.arange(len(labels)), {"num_resamples": num_resamples, "seed": seed}
    try:
        one = metrics.bootstrap_ci(lambda rows: score(predictions[rows], labels[rows]), rows, **how)
    except metrics.UndefinedMetricError:
        return None
    return {"low": one.low, "high": one.high}


def ood_report(inside: Predictions, outside: Predictions) -> dict[str, float]:
    """Return by score of the predictions its AUROC of telling ``outside`` from ``inside``.

    >>> sure, unsure = ClassPredictions(np.array([[0.9, 0.1]])), ClassPredictions(np.array([[0.5, 0.5]]))
    >>> ood_report(sure, unsure)
    {'entropy': 1.0, 'max_probability': 1.0}
    """
    is_ood = np.repeat([0, 1], [len(inside.total), len(outside.total)])
    first, second = inside.ood_scores, outside.ood_scores
    return {name: metrics.ood_auroc(np.concatenate([first[name], second[name]]), is_ood) for name in first}


def format_table(rows: Mapping[str, Row], *, corner: str = "", digits: int = 3) -> str:
    """Return a text table: a line per row, the columns of all rows in order of appearance; "-" where there is no value.

    Args:
        rows: by label, values by column; text stands as it is.
        corner: heading of the labels.
        digits: decimals of a number.

    >>> print(format_table({"point": {"nll": 0.5}, "Bayesian": {"nll": 0.4, "epistemic": 0.1}}, corner="method"))
    method       nll  epistemic
    ---------------------------
    point      0.500          -
    Bayesian   0.400      0.100
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    first = max(map(len, [corner, *rows]))
    cells = [columns, *([_cell(row.get(name), digits) for name in columns] for row in rows.values())]
    widths = [max(digits + 3, *map(len, column)) for column in zip(*cells, strict=True)]  # room for a sign
    header, *lines = [
        "  ".join([label.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for label, row in zip([corner, *rows], cells, strict=True)
    ]
    return "\n".join([header, "-" * len(header), *lines])


def _cell(value: float | str | None, digits: int) -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def write_json(path: str | PathLike[str], results: Mapping[str, Any]) -> None:
    """Write `results` as JSON that any reader takes: NumPy numbers and arrays as lists, NaN and infinities as null."""
    Path(path).write_text(json.dumps(_plain(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
