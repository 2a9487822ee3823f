"""Refusing to answer: the error that remains among the most certain examples.

``confidence`` (N,) is any score that is higher for more certain examples (negate an uncertainty); ``error`` (N,) is
0/1, or any loss >= 0. With the examples sorted from most to least certain, the risk of the first k is

    R(k) = (1/k) sum_{i <= k} e_i,    k = 1 .. n,    at coverage k/n

and areas are means over these n points (no trapezoid, no point at coverage 0). Examples of equal confidence all count
with their group's mean error, which is the expectation over the orders they could have: results never depend on the
order of the input, and a constant confidence has R(k) = the base error rate for every k.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ._checks import (
    FloatArray,
    UndefinedMetricError,
    float_array,
    score_and_error,
    score_and_indicator,
    within,
)

ROUNDING = 1e-12
"""Slack in comparisons of shares: 1 - 0.9 must not exclude a risk of exactly 0.1."""


@dataclass(frozen=True)
class RiskCoverageCurve:
    """``coverage`` k/n and ``risk`` R(k) for k = 1 .. n, both (n,)."""

    coverage: FloatArray
    risk: FloatArray


@dataclass(frozen=True)
class Refusal:
    """To reach ``target_accuracy``, refuse the share ``refused`` in [0, 1]; the rest then has ``accuracy``.

    ``refused`` is 1 and ``accuracy`` NaN where no coverage reaches the target.
    """

    target_accuracy: float
    refused: float
    accuracy: float


@dataclass(frozen=True)
class AccuracyVersusUncertainty:
    """``values`` AvU(t) at ``thresholds``, both (T,), and their area over the rescaled thresholds, in [0, 1]."""

    thresholds: FloatArray
    values: FloatArray
    area: float


def risk_coverage_curve(confidence: ArrayLike, error: ArrayLike) -> RiskCoverageCurve:
    """Return R(k) against k/n, tie-aware.

    >>> risk_coverage_curve([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1]).risk.round(4).tolist()
    [0.0, 0.0, 0.3333, 0.5]
    """
    scores, errors = score_and_error(confidence, error, "confidence")
    ranks = np.arange(1, len(errors) + 1)
    return RiskCoverageCurve(coverage=ranks / len(errors), risk=_sorted_errors(scores, errors).cumsum() / ranks)


def aurc(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return AURC = mean_k R(k): the mean selective risk over coverages. Geifman & El-Yaniv 2017, arXiv 1705.08500.

    >>> round(aurc([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1]), 4)
    0.2083
    """
    return float(risk_coverage_curve(confidence, error).risk.mean())


def e_aurc(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return E-AURC = AURC - AURC of the oracle, which ranks by the error; >= 0. Geifman et al. 2019, arXiv 1805.08206.

    >>> e_aurc([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1])
    0.0
    """
    scores, errors = score_and_error(confidence, error, "confidence")
    return aurc(scores, errors) - aurc(-errors, errors)


def augrc(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return AUGRC = mean_k R(k) k/n: the mean share of all examples that are silent failures. Traub et al. 2024.

    >>> augrc([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1])
    0.1875
    """
    curve = risk_coverage_curve(confidence, error)
    return float((curve.risk * curve.coverage).mean())


def prr(confidence: ArrayLike, error: ArrayLike) -> float:
    """Return the prediction-rejection ratio (AURC - base) / (AURC of the oracle - base): 1 the oracle, 0 chance.

    ``base`` is the mean error, the AURC of a random ranking in closed form. Undefined where all errors are equal, as
    there is nothing to rank. Malinin et al. 2020, arXiv 1905.00076, on the selective risk R(k).

    Raises:
        UndefinedMetricError: all errors are equal.

    >>> prr([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1]), prr([1, 1, 1, 1], [0, 0, 1, 1])
    (1.0, 0.0)
    """
    scores, errors = score_and_error(confidence, error, "confidence")
    base = float(errors.mean())
    if errors.min() == errors.max():
        raise UndefinedMetricError(f"`error` is {errors[0]} for every example: no ranking is better than another.")
    return (aurc(scores, errors) - base) / (aurc(-errors, errors) - base)


def risk_at_coverage(confidence: ArrayLike, error: ArrayLike, coverage: float) -> float:
    """Return R(k) at the smallest k >= 1 with k/n >= ``coverage``.

    Args:
        confidence: a score that is higher for more certain examples, (N,).
        error: 0/1, or any loss >= 0, (N,).
        coverage: the share in [0, 1] of examples to answer.

    >>> risk_at_coverage([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], coverage=0.5)
    0.0
    """
    within(coverage, 0.0, 1.0, "coverage")
    curve = risk_coverage_curve(confidence, error)
    return float(curve.risk[int(np.argmax(curve.coverage >= coverage - ROUNDING))])


def coverage_at_risk(confidence: ArrayLike, error: ArrayLike, risk: float) -> float:
    """Return the largest coverage k/n with R(k) <= ``risk``; 0 where there is none.

    Args:
        confidence: a score that is higher for more certain examples, (N,).
        error: 0/1, or any loss >= 0, (N,).
        risk: the mean error >= 0 that is accepted, in the errors' unit.

    >>> coverage_at_risk([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], risk=0.4)
    0.75
    """
    within(risk, 0.0, float("inf"), "risk")
    curve = risk_coverage_curve(confidence, error)
    allowed = curve.coverage[curve.risk <= risk + ROUNDING]
    return float(allowed.max()) if allowed.size else 0.0


def refusal_table(
    confidence: ArrayLike, error: ArrayLike, target_accuracies: Sequence[float] = (0.8, 0.9, 0.95, 0.99)
) -> list[Refusal]:
    """Return how large a share to refuse to reach each accuracy, which is 1 - risk.

    Args:
        confidence: a score that is higher for more certain examples, (N,).
        error: the error of each example, (N,), in [0, 1].
        target_accuracies: the accuracies to reach, shares in [0, 1].

    Raises:
        TypeError: ``target_accuracies`` is no list.
        ValueError: an error or a target lies outside [0, 1].

    >>> refusal_table([0.9, 0.8, 0.7, 0.6], [0, 0, 1, 1], [0.5, 0.9])
    [Refusal(target_accuracy=0.5, refused=0.0, accuracy=0.5), Refusal(target_accuracy=0.9, refused=0.5, accuracy=1.0)]
    """
    scores, errors = score_and_error(confidence, error, "confidence")
    if errors.max() > 1:
        raise ValueError(f"`error` must lie in [0, 1] for an accuracy to exist, got {errors.max()}.")
    if isinstance(target_accuracies, str) or not isinstance(target_accuracies, Iterable):
        raise TypeError(f"`target_accuracies` must be a list of shares in [0, 1], got {target_accuracies!r}.")
    for target in target_accuracies:
        within(target, 0.0, 1.0, "target_accuracies")
    return [_refusal(scores, errors, float(target)) for target in target_accuracies]


def accuracy_vs_uncertainty(
    uncertainty: ArrayLike, error: ArrayLike, thresholds: ArrayLike | None = None
) -> AccuracyVersusUncertainty:
    """Return AvU(t) = (n_AC + n_IU) / n: the share of accurate and certain (u <= t) or inaccurate and uncertain ones.

    The area (AUAvU) is the trapezoid over thresholds rescaled to [0, 1]. Krishnan & Tickoo 2020, arXiv 2012.07923.

    Args:
        uncertainty: a score u that is higher for less certain examples, (N,).
        error: 0 for an accurate prediction, 1 for an inaccurate one, (N,).
        thresholds: the thresholds t, strictly increasing, in the unit of u; by default 21 evenly spaced from the least
            to the greatest uncertainty.

    Raises:
        ValueError: the thresholds are not at least 2, strictly increasing.

    >>> result = accuracy_vs_uncertainty([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], thresholds=[0.1, 0.25, 0.4])
    >>> result.values.tolist(), result.area
    ([0.75, 1.0, 0.5], 0.8125)
    """
    scores, wrong = score_and_indicator(uncertainty, error, "uncertainty", "error")
    position = np.linspace(0.0, 1.0, 21)
    if thresholds is None:
        limits = scores.min() + (scores.max() - scores.min()) * position
    else:
        limits = float_array(thresholds, "thresholds", ndim=1)
        if len(limits) < 2 or (np.diff(limits) <= 0).any():
            raise ValueError(f"`thresholds` must be at least 2, strictly increasing, got {limits.tolist()}.")
        position = (limits - limits[0]) / (limits[-1] - limits[0])
    certain = scores <= limits[:, None]
    values = (certain != wrong).mean(1)
    area = np.diff(position) @ (values[1:] + values[:-1]) / 2
    return AccuracyVersusUncertainty(limits, values, float(area))


def _refusal(confidence: FloatArray, error: FloatArray, target: float) -> Refusal:
    coverage = coverage_at_risk(confidence, error, 1.0 - target)
    accuracy = 1.0 - risk_at_coverage(confidence, error, coverage) if coverage else float("nan")
    return Refusal(target_accuracy=target, refused=1.0 - coverage, accuracy=accuracy)


def _sorted_errors(confidence: FloatArray, error: FloatArray) -> FloatArray:
    """Errors from most to least certain, each replaced by the mean over its group of equal confidence."""
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    means = np.bincount(group, error) / counts
    return np.repeat(means, counts)
