"""Which score of doubt tells wrong answers: AUROC with intervals, paired gains, and refusing at a threshold.

Each score is of one model's answers, and says which of *these* are wrong; two models' scores are compared on the same
questions, resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import metrics

__all__ = ["doubt_gains", "doubt_report", "refusal_threshold"]


def refusal_threshold(score: ArrayLike, wrong: ArrayLike, target_accuracy: float) -> float:
    """Return the largest score up to which answers reach the accuracy on held-out questions; -inf where none does.

    Args:
        score: of doubt, higher where wrong answers are expected, (N,).
        wrong: 0/1, (N,).
        target_accuracy: of the answers that are given, in [0, 1].

    >>> refusal_threshold([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 0.6)
    0.3
    """
    scores = np.asarray(score, dtype=np.float64)
    coverage = metrics.coverage_at_risk(-scores, np.asarray(wrong, dtype=np.float64), 1 - target_accuracy)
    answered = round(coverage * len(scores))
    return float(np.sort(scores)[answered - 1]) if answered else -math.inf


def doubt_report(
    scores: Mapping[str, ArrayLike],
    wrong: Mapping[str, ArrayLike],
    limits: Mapping[str, float],
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, dict[str, float | str | None]]:
    """Return for each score its AUROC of wrong answers with a 95 % interval, AURC, and what refusing does.

    Args:
        scores: of doubt, by name, (N,) each.
        wrong: by the same names, 0/1 of the answers that the score is about, (N,).
        limits: by the same names, the threshold above which an answer is refused; see `refusal_threshold`.
        seed: of the bootstrap over questions.
        options: of `metrics.bootstrap_ci`.

    Returns:
        Rows for `format_table`; None where a number has no value, such as an AUROC without a wrong answer.
    """
    report = {}
    for name, values in scores.items():
        score, errors = np.asarray(values, dtype=np.float64), np.asarray(wrong[name], dtype=np.float64)
        given = score <= limits[name]
        report[name] = {
            **_told("auroc", metrics.bootstrap_ci, score, errors, seed=seed, **options),
            "aurc": metrics.aurc(-score, errors),
            "answered": float(given.mean()),
            "accuracy_of_answered": float(1 - errors[given].mean()) if given.any() else None,
        }
    return report


def doubt_gains(
    scores: Mapping[str, ArrayLike], wrong: Mapping[str, ArrayLike], reference: str, *, seed: int = 0, **options: Any
) -> dict[str, dict[str, float | str | None]]:
    """Return how much higher the AUROC of the score ``reference`` is than each other one's, with a 95 % interval.

    Args:
        scores: of doubt, by name, (N,) each, about the same questions.
        wrong: by the same names, 0/1 of the answers that the score is about, (N,).
        reference: one of the names.
        seed: of the bootstrap over questions.
        options: of `metrics.paired_bootstrap`.

    Raises:
        ValueError: there is no score of that name.
    """
    if reference not in scores:
        raise ValueError(f"`reference` must be one of {list(scores)}, got {reference!r}.")
    first = scores[reference], wrong[reference]
    pairs = {name: (first, (score, wrong[name])) for name, score in scores.items() if name != reference}
    return {name: _told("gain", metrics.paired_bootstrap, *pair, seed=seed, **options) for name, pair in pairs.items()}


def _told(
    key: str, bootstrap: Callable[..., metrics.BootstrapInterval], *arrays: Any, **options: Any
) -> dict[str, float | str | None]:
    try:
        found = bootstrap(metrics.ood_auroc, *arrays, **options)
    except metrics.UndefinedMetricError:  # all answers right, or all wrong
        return {key: None, "interval": None}
    return {key: found.estimate, "interval": f"[{found.low:.3f}, {found.high:.3f}]"}
