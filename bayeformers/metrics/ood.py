"""Telling two groups apart by a score: errors by low confidence, out-of-distribution inputs by high uncertainty.

The group to be found is the positive one: wrong predictions, or out-of-distribution (OOD) inputs. Detection flags all
examples whose uncertainty is at least a threshold; examples of equal score are flagged together, so no result depends
on the order of the input. All functions raise `UndefinedMetricError`, a ValueError, where only one group is present.
"""

import numpy as np
from numpy.typing import ArrayLike

from ._checks import FloatArray, UndefinedMetricError, score_and_indicator


def error_auroc(confidence: ArrayLike, error: ArrayLike) -> float:
    """P(confidence of a wrong prediction < that of a right one), ties counting half: 1 perfect, 1/2 chance.

    Shape: ``confidence`` (N,), higher for more certain; ``error`` (N,), 0/1.

    >>> error_auroc([0.9, 0.8, 0.7, 0.7], [0, 0, 0, 1])
    0.8333333333333334
    """
    rates = _operating_points(confidence, error, "confidence", "error", sign=-1)
    return _area_under_roc(*rates)


def error_aupr(confidence: ArrayLike, error: ArrayLike) -> float:
    """Area under the precision-recall curve of finding wrong predictions by low confidence; chance is the error rate.

    Average precision, sum over thresholds of (recall step) x precision: no interpolation.

    >>> error_aupr([0.9, 0.8, 0.7, 0.7], [0, 0, 0, 1])
    0.5
    """
    rates = _operating_points(confidence, error, "confidence", "error", sign=-1)
    return _average_precision(*rates)


def ood_auroc(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """P(uncertainty of an OOD input > that of an in-distribution one), ties counting half.

    Shape: ``uncertainty`` (N,), ``is_ood`` (N,), 0/1 with OOD = 1.

    >>> ood_auroc([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
    1.0
    """
    rates = _operating_points(uncertainty, is_ood, "uncertainty", "is_ood")
    return _area_under_roc(*rates)


def ood_aupr(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """Average precision of finding OOD inputs by high uncertainty; chance is their share.

    >>> ood_aupr([0.1, 0.4, 0.3, 0.2], [0, 0, 1, 1])
    0.5833333333333333
    """
    rates = _operating_points(uncertainty, is_ood, "uncertainty", "is_ood")
    return _average_precision(*rates)


def fpr_at_95_tpr(uncertainty: ArrayLike, is_ood: ArrayLike) -> float:
    """The smallest false-positive rate among thresholds that find at least 95 % of the OOD inputs; lower is better.

    >>> fpr_at_95_tpr([0.1, 0.4, 0.3, 0.2], [0, 0, 1, 1])
    0.5
    """
    found, flagged_wrongly = _operating_points(uncertainty, is_ood, "uncertainty", "is_ood")
    true_rate, false_rate = found / found[-1], flagged_wrongly / flagged_wrongly[-1]
    return float(false_rate[true_rate >= 0.95].min())


def _operating_points(
    score: ArrayLike, positive: ArrayLike, score_name: str, name: str, *, sign: int = 1
) -> tuple[FloatArray, FloatArray]:
    """Counts of true and of false positives at each distinct threshold, from the highest ``sign * score`` down."""
    scores, positives = score_and_indicator(score, positive, score_name, name)
    if positives.all() or not positives.any():
        raise UndefinedMetricError(
            f"`{name}` is {int(positives[0])} for all {len(positives)} examples; a detection metric compares two "
            "groups and needs at least one example of each."
        )
    _, group = np.unique(-sign * scores, return_inverse=True)
    return np.bincount(group, positives).cumsum(), np.bincount(group, ~positives).cumsum()


def _area_under_roc(found: FloatArray, flagged_wrongly: FloatArray) -> float:
    """Share of pairs in which the positive one is flagged first; a tied pair counts half."""
    before = found - np.diff(found, prepend=0.0)
    pairs = np.diff(flagged_wrongly, prepend=0.0) * (before + found) / 2
    return float(pairs.sum() / (found[-1] * flagged_wrongly[-1]))


def _average_precision(found: FloatArray, flagged_wrongly: FloatArray) -> float:
    recall_steps = np.diff(found, prepend=0.0) / found[-1]
    return float((recall_steps * found / (found + flagged_wrongly)).sum())
