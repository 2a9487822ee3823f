"""Telling two groups apart by a score: errors by low confidence, out-of-distribution inputs by high uncertainty.

The group to be found is the positive one: wrong predictions, or out-of-distribution (OOD) inputs. Detection flags all
examples whose uncertainty is at least a threshold; examples of equal score are flagged together, so no result depends
on the order of the input. All functions raise `UndefinedMetricError`, a ValueError, where only one group is present.
The numbers are scikit-learn's. The areas under the receiver's curve are counted here, for intervals ask for hundreds of
them and scikit-learn's checks of its arguments take a hundred times as long; for the others it is imported when the
first is asked for: that takes as long as the package itself.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import FloatArray, UndefinedMetricError, score_and_indicator


def error_auroc(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return P(confidence of a wrong prediction < that of a right one), ties counting half: 1 perfect, 1/2 chance.

    Shape: ``confidence`` (N,), higher for more certain; ``error`` (N,), 0/1.

    >>> error_auroc([0.9, 0.8, 0.7, 0.7], [0, 0, 0, 1])
    0.8333333333333334
    """
    return _auroc(*_groups(confidence, error, "confidence", "error", sign=-1))


def error_aupr(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return the area under the precision-recall curve of finding errors by low confidence; chance is the error rate.

    Average precision, sum over thresholds of (recall step) x precision: no interpolation.

    >>> error_aupr([0.9, 0.8, 0.7, 0.7], [0, 0, 0, 1])
    0.5
    """
    return _average_precision(*_groups(confidence, error, "confidence", "error", sign=-1))


def ood_auroc(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """Return P(uncertainty of an OOD input > that of an in-distribution one), ties counting half.

    Shape: ``uncertainty`` (N,), ``is_ood`` (N,), 0/1 with OOD = 1.

    >>> ood_auroc([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
    1.0
    """
    return _auroc(*_groups(uncertainty, is_ood, "uncertainty", "is_ood"))


def ood_aupr(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """Return the average precision of finding OOD inputs by high uncertainty; chance is their share.

    >>> ood_aupr([0.1, 0.4, 0.3, 0.2], [0, 0, 1, 1])
    0.5833333333333333
    """
    return _average_precision(*_groups(uncertainty, is_ood, "uncertainty", "is_ood"))


def fpr_at_95_tpr(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """Return the least false-positive rate of thresholds that find at least 95 % of the OOD inputs; lower is better.

    >>> fpr_at_95_tpr([0.1, 0.4, 0.3, 0.2], [0, 0, 1, 1])
    0.5
    """
    from sklearn.metrics import roc_curve

    false_rate, true_rate, _ = roc_curve(
        *_groups(uncertainty, is_ood, "uncertainty", "is_ood"), drop_intermediate=False
    )
    return float(false_rate[true_rate >= 0.95].min())


def _auroc(positive: NDArray[np.bool_], score: FloatArray) -> float:
    """Mann & Whitney 1947: the share of (positive, negative) pairs whose positive scores higher, ties counting half."""
    _, place, sizes = np.unique(score, return_inverse=True, return_counts=True)
    positives = np.bincount(place, weights=positive)  # of each distinct score, from the lowest on
    negatives = sizes - positives
    lower = negatives.cumsum() - negatives
    return float(positives @ (lower + negatives / 2) / (positives.sum() * negatives.sum()))


def _average_precision(positive: NDArray[np.bool_], score: FloatArray) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, score))


def _groups(
    score: ArrayLike, positive: ArrayLike, score_name: str, name: str, *, sign: int = 1
) -> tuple[NDArray[np.bool_], FloatArray]:
    """Which examples are positive, and ``sign * score``; both groups are there."""
    scores, positives = score_and_indicator(score, positive, score_name, name)
    if positives.all() or not positives.any():
        raise UndefinedMetricError(
            f"`{name}` is {int(positives[0])} for all {len(positives)} examples; a detection metric compares two "
            "groups and needs at least one example of each."
        )
    return positives, sign * scores
