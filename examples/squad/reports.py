"""The numbers that compare methods: scores by group, what uncertainty can tell, differences, all with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayeformers.metrics import UndefinedMetricError, aurc, bootstrap_ci, error_auroc, ood_auroc, paired_bootstrap
from examples.squad.answers import Answers, Array
from examples.squad.articles import GROUPS, SHIFTED, UNANSWERABLE

ALL = "all questions"
"""Of the test set, beside its groups."""
BySet = dict[str, Answers]
"""A method's answers to the sets "validation", "test" and, where there is one, "shifted"."""
Interval = dict[str, float]


def method_report(answers: BySet, groups: dict[str, NDArray[np.str_]], has_null: bool) -> dict[str, Any]:
    """``groups`` holds, by set, the group of each question; ``detection`` are AUROCs with intervals."""
    test, names = answers["test"], groups["test"]
    found = {ALL: group_report(test)}
    if len(set(names)) > 1:
        found |= {group: group_report(test[names == group]) for group in GROUPS if group in names}
    detection = detection_report(test, names == UNANSWERABLE, has_null)
    if SHIFTED in answers:
        found[SHIFTED] = group_report(answers[SHIFTED])
        detection |= shift_report(test, answers[SHIFTED])
    return {"groups": found, "detection": detection}


def group_report(answers: Answers) -> dict[str, float]:
    """Means over questions; the NLL over those whose truth is in reach, whose share stands beside it."""
    reachable = np.isfinite(answers.nll)
    return {
        "questions": len(answers.texts),
        "exact_match": float(answers.exact_match.mean()),
        "f1": float(answers.f1.mean()),
        "confidence": float(answers.confidence.mean()),
        "nll": float(answers.nll[reachable].mean()) if reachable.any() else math.nan,
        "in_reach": float(reachable.mean()),
        "aurc": aurc(answers.confidence, 1 - answers.exact_match),
        "aurc_f1": aurc(answers.confidence, 1 - answers.f1),
        "entropy": float(answers.total.mean()),
        "aleatoric": float(answers.aleatoric.mean()),
        "epistemic": float(answers.epistemic.mean()),
    }


def wrong_answer_scores(answers: Answers) -> dict[str, Array]:
    """What can tell wrong answers, larger for more doubtful ones."""
    return {"span entropy": answers.total, "1 - p(answer)": 1 - answers.confidence, **_epistemic(answers)}


def no_answer_scores(answers: Answers) -> dict[str, Array]:
    """What can tell questions without an answer."""
    return {"p(no answer)": answers.no_answer, "span entropy": answers.total, **_epistemic(answers)}


def _epistemic(answers: Answers) -> dict[str, Array]:
    return {"mutual information": answers.epistemic} if answers.epistemic.any() else {}


def detection_report(answers: Answers, unanswerable: NDArray[np.bool_], has_null: bool) -> dict[str, Interval]:
    """AUROCs with 95 % bootstrap intervals, by "what, by which score"; only where there are questions of both kinds."""
    wrong = 1 - answers.exact_match
    found = {
        f"wrong answers, by {name}": _interval(lambda score, error: error_auroc(-score, error), score, wrong)
        for name, score in wrong_answer_scores(answers).items()
    }
    if has_null:
        found |= {
            f"unanswerable questions, by {name}": _interval(ood_auroc, score, unanswerable)
            for name, score in no_answer_scores(answers).items()
        }
    return {name: interval for name, interval in found.items() if interval is not None}


def shift_report(test: Answers, shifted: Answers) -> dict[str, Interval]:
    """The same for telling shifted questions from the test set's."""
    is_shifted = np.repeat([0, 1], [len(test.texts), len(shifted.texts)])
    inside, outside = wrong_answer_scores(test), wrong_answer_scores(shifted)
    joined = {name: np.concatenate([inside[name], outside[name]]) for name in inside if name in outside}
    found = {name: _interval(ood_auroc, score, is_shifted) for name, score in joined.items()}
    return {f"shifted questions, by {name}": interval for name, interval in found.items() if interval is not None}


def _interval(metric: Callable[..., float], *arrays: Any) -> Interval | None:
    try:
        interval = bootstrap_ci(metric, *arrays)
    except UndefinedMetricError:
        return None
    return {"auroc": interval.estimate, "low": interval.low, "high": interval.high}


def difference_report(first: Answers, second: Answers) -> dict[str, Interval]:
    """``first`` less ``second`` on the same questions, with 95 % paired bootstrap intervals."""
    reachable = np.isfinite(first.nll) & np.isfinite(second.nll)
    compared: dict[str, tuple[Callable[..., float], Callable[[Answers], tuple[Array, ...]]]] = {
        "exact_match": (_mean, lambda answers: (answers.exact_match,)),
        "f1": (_mean, lambda answers: (answers.f1,)),
        "nll": (_mean, lambda answers: (answers.nll[reachable],)),
        "aurc": (aurc, lambda answers: (answers.confidence, 1 - answers.exact_match)),
        "aurc_f1": (aurc, lambda answers: (answers.confidence, 1 - answers.f1)),
        "wrong answers, by span entropy": (error_auroc, lambda answers: (-answers.total, 1 - answers.exact_match)),
    }
    if not reachable.any():
        del compared["nll"]
    found = {}
    for name, (metric, arrays) in compared.items():
        try:
            interval = paired_bootstrap(metric, arrays(first), arrays(second))
        except UndefinedMetricError:  # no wrong answer, or no right one
            continue
        found[name] = {"difference": interval.estimate, "low": interval.low, "high": interval.high}
    return found


def _mean(values: Array) -> float:
    return float(np.mean(values))
