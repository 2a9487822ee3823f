"""Scores of a page from numbers per input, so that a bootstrap resamples vectors (N,) and never a matrix (N, C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from ... import metrics
from ...metrics.calibration import DEFAULT_BINS, bins_of
from ...metrics.scoring import PROBABILITY_FLOOR
from ..report import ClassPredictions, RegressionPredictions

__all__ = ["COVERED", "Score", "by_input", "clopper_pearson", "estimate", "paired", "scores_of"]

Array = NDArray[Any]
LEVEL = 0.95
COVERED = 1.959964
"""Standard deviations of a central 95 % interval of a Gaussian."""


@dataclass(frozen=True)
class Score:
    """A number of a method.

    Attributes:
        arrays: names of the numbers per input that it takes; see `by_input`.
        function: of these.
        better: "higher", "lower", or "" where neither is.
        is_share: whether it is shown in percent.
        is_mean: whether it is the mean of 0 and 1, whose interval is exact.
    """

    arrays: tuple[str, ...]
    function: Callable[..., float]
    better: str
    is_share: bool = False
    is_mean: bool = False


def _ece(confidence: Array, right: Array) -> float:
    return bins_of(confidence, right > 0.5, DEFAULT_BINS, "width").expected_error


def _error_auroc(confidence: Array, wrong: Array) -> float:
    return metrics.error_auroc(confidence, wrong)


def _matthews(predicted: Array, label: Array) -> float:
    """Of two classes: the correlation of prediction and label; 0 where one of them is constant."""
    spread = predicted.std() * label.std()
    return float(np.mean((predicted - predicted.mean()) * (label - label.mean())) / spread) if spread else 0.0


def _mean(values: Array) -> float:
    return float(values.mean())


def _root(values: Array) -> float:
    return float(np.sqrt(values.mean()))


_CLASS_SCORES = {
    "accuracy": Score(("right",), _mean, "higher", is_share=True, is_mean=True),
    "NLL": Score(("nll",), _mean, "lower"),
    "ECE": Score(("confidence", "right"), _ece, "lower", is_share=True),
    "Brier": Score(("brier",), _mean, "lower"),
    "AUROC of errors": Score(("confidence", "wrong"), _error_auroc, "higher"),
}
_MATTHEWS = {"Matthews": Score(("predicted", "label"), _matthews, "higher")}
_NUMBER_SCORES = {
    "RMSE": Score(("squared",), _root, "lower"),
    "NLL": Score(("nll",), _mean, "lower"),
    "in the 95 % interval": Score(("covered",), _mean, "", is_share=True, is_mean=True),
}


def scores_of(num_classes: int) -> Mapping[str, Score]:
    """The scores of a head with C classes, 0 of a regression; the correlation of Matthews is of two classes alone."""
    if num_classes == 0:
        return _NUMBER_SCORES
    first, *rest = _CLASS_SCORES
    two = _MATTHEWS if num_classes == 2 else {}
    return {first: _CLASS_SCORES[first], **two, **{name: _CLASS_SCORES[name] for name in rest}}


def by_input(predictions: ClassPredictions | RegressionPredictions, labels: ArrayLike) -> dict[str, Array]:
    """Return the numbers per input that scores are made of, (N,) each."""
    truth = np.asarray(labels)
    if isinstance(predictions, RegressionPredictions):
        squared, total = (predictions.mean - truth) ** 2, np.asarray(predictions.total)
        covered = (squared <= COVERED**2 * total).astype(np.float64)
        return {"squared": squared, "nll": 0.5 * (np.log(2 * np.pi * total) + squared / total), "covered": covered}
    probs, rows = np.asarray(predictions.probs, dtype=np.float64), np.arange(len(truth))
    of_label, decided = probs[rows, truth], probs.argmax(1)
    wrong = (decided != truth).astype(np.float64)
    return {
        "nll": -np.log(np.clip(of_label, PROBABILITY_FLOOR, 1.0)),
        "brier": np.einsum("nc,nc->n", probs, probs) - 2 * of_label + 1,
        "confidence": probs.max(1).clip(0.0, 1.0),
        "right": 1 - wrong,
        "wrong": wrong,
        "predicted": decided.astype(np.float64),
        "label": truth.astype(np.float64),
    }


def estimate(
    score: Score, numbers: Mapping[str, Array], *, num_resamples: int, seed: int
) -> tuple[float | None, float | None, float | None]:
    """Return a score and the ends of its 95 % interval: Clopper and Pearson's of a share, else the bootstrap's.

    Args:
        score: what to compute.
        numbers: of `by_input`.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The three; None where there is no value.
    """
    arrays = [numbers[name] for name in score.arrays]
    try:
        if score.is_mean:
            low, high = clopper_pearson(arrays[0].sum(), len(arrays[0]))
            return score.function(*arrays), float(low), float(high)
        found = metrics.bootstrap_ci(score.function, *arrays, num_resamples=num_resamples, seed=seed)
    except metrics.UndefinedMetricError:
        return None, None, None
    return found.estimate, found.low, found.high


def paired(
    score: Score, first: Mapping[str, Array], second: Mapping[str, Array], *, num_resamples: int, seed: int
) -> metrics.BootstrapInterval | None:
    """Return the first method's score less the second's, both on the same resamples; None where there is no value.

    Args:
        score: what to compute.
        first: of `by_input`.
        second: of `by_input`, on the same inputs.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    pair = [[numbers[name] for name in score.arrays] for numbers in (first, second)]
    try:
        return metrics.paired_bootstrap(score.function, *pair, num_resamples=num_resamples, seed=seed)
    except metrics.UndefinedMetricError:
        return None


def clopper_pearson(hits: ArrayLike, trials: ArrayLike) -> tuple[Array, Array]:
    """Return the ends of the exact 95 % interval of a share (Clopper & Pearson 1934), of whatever shape.

    Of trials with unequal chances it is an interval of their mean, on the safe side (Hoeffding 1956).

    Args:
        hits: how many trials succeeded.
        trials: how many there were, >= 1.

    >>> [round(float(end), 4) for end in clopper_pearson(0, 10)]
    [0.0, 0.3085]
    """
    k, n = np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    tail = (1 - LEVEL) / 2
    low = np.where(k > 0, beta.ppf(tail, np.maximum(k, 1e-9), n - k + 1), 0.0)
    high = np.where(k < n, beta.ppf(1 - tail, k + 1, np.maximum(n - k, 1e-9)), 1.0)
    return low, high
