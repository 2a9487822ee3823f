"""From the gathered columns of an evaluation to its metrics and per-example uncertainties; NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_utils import PredictionOutput

from ..likelihoods.segmentation import CONFIDENCE, WRONG
from ..metrics import aurc, brier_score, expected_calibration_error
from ..metrics.calibration import DEFAULT_BINS, bins_of

__all__ = ["BayesianPredictionOutput", "Columns", "evaluation_metrics"]


class BayesianPredictionOutput(PredictionOutput):
    """A `PredictionOutput` (it unpacks into the same three) with `uncertainty`: arrays (N, ...) by name.

    Token-level arrays are padded with NaN to the longest example.
    """

    uncertainty: dict[str, NDArray[np.floating]]

    def __new__(
        cls, predictions: Any, label_ids: Any, metrics: Any, uncertainty: dict[str, NDArray[np.floating]]
    ) -> "BayesianPredictionOutput":
        """Takes `PredictionOutput`'s three fields and the uncertainties."""
        output = super().__new__(cls, predictions, label_ids, metrics)
        output.uncertainty = uncertainty
        return output

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.uncertainty)


class _Batch(NamedTuple):
    columns: dict[str, NDArray[Any]]
    uncertainty: tuple[str, ...]


class Columns:
    """Gathered arrays by name, one list entry per batch."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []
        self._sort: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray

    def add(self, columns: dict[str, NDArray[Any]], uncertainty: tuple[str, ...]) -> None:
        """One batch's arrays; ``uncertainty`` names those that describe inputs whether or not they have labels."""
        self._batches.append(_Batch(columns, uncertainty))

    def sort(self, rows_of: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        """Change the order in which `uncertainties` gives the rows."""
        self._sort = rows_of

    def uncertainties(self) -> dict[str, NDArray[np.floating]]:
        """(N,), (N, L) or (N, T) by name; shorter rows are padded with NaN."""
        names = self._batches[0].uncertainty if self._batches else ()
        columns = {name: _padded([_attended(batch.columns, name) for batch in self._batches]) for name in names}
        return {name: self._sort(column) for name, column in columns.items()}

    def items(self) -> dict[str, NDArray[Any]]:
        """Every column at the items that count: (n,) or (n, C) each."""
        names = self._batches[0].columns if self._batches else {}
        return {
            name: np.concatenate([_counted(batch.columns, name) for batch in self._batches])
            for name in names
            if name not in ("mask", "attended")
        }


def _attended(columns: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    """NaN at padding, where a value depends on what the example was batched with."""
    attended = columns.get("attended")
    return columns[name] if attended is None else np.where(attended.astype(bool), columns[name], np.nan)


def _counted(columns: dict[str, NDArray[Any]], name: str) -> NDArray[Any]:
    mask = columns.get("mask")
    return columns[name] if mask is None else columns[name][mask.astype(bool)]


def _padded(arrays: list[NDArray[Any]]) -> NDArray[np.floating]:
    shape = np.max([array.shape[1:] for array in arrays], axis=0)
    return np.concatenate([
        np.pad(
            array,
            [(0, 0), *((0, full - own) for full, own in zip(shape, array.shape[1:], strict=True))],
            constant_values=np.nan,
        )
        for array in arrays
    ])


def evaluation_metrics(columns: Columns) -> dict[str, float]:
    """Metrics over the items of an evaluation, unprefixed: means of the columns, and scores of the probabilities.

    `nll` is that of the averaged prediction; a regression adds `rmse`. Without labels only the uncertainties.

    Returns:
        Metrics by name.
    """
    items = columns.items()
    confidence, wrong = items.pop(CONFIDENCE, None), items.pop(WRONG, None)
    averaged = {name: values for name, values in items.items() if name not in ("probs", "labels") and values.size > 0}
    metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in averaged.items()}
    if "nll" in items and "nll" not in averaged:
        metrics["nll"] = float("nan")  # labels, none of which counts: no loss, and no best model by it
    if "squared_error" in metrics:
        metrics["rmse"] = metrics.pop("squared_error") ** 0.5
    if "probs" in items and "labels" in items and len(items["labels"]):
        probs = items["probs"].reshape(-1, items["probs"].shape[-1]).astype(np.float64)
        probs, labels = probs / probs.sum(1, keepdims=True), items["labels"].ravel().astype(np.int64)
        metrics["ece"] = expected_calibration_error(probs, labels)
        metrics["brier"] = brier_score(probs, labels)
        metrics["aurc"] = aurc(probs.max(1), (probs.argmax(1) != labels).astype(np.float64))
    if confidence is not None and wrong is not None and len(wrong):
        bins = bins_of(confidence.astype(np.float64), wrong == 0, DEFAULT_BINS, "width")
        metrics["ece"], metrics["aurc"] = bins.expected_error, aurc(confidence, wrong.astype(np.float64))
    return metrics
