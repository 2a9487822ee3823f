"""`fit_prediction_sets`: from labelled rows that nothing was fitted to, to the thresholds of `PredictionSets`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..posteriors import Posterior
from .classes import ClassRows
from .labelled import Collator, calibration_rows
from .nonconformity import SetMethod, class_scores, true_scores
from .quantiles import ALL, Cutoffs, check_alpha, conformal_quantile, group_keys
from .sets import CALIBRATION, PredictionSets, Promise, SetScore

__all__ = ["false_negative_threshold", "fit_prediction_sets"]

PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
"""Of Angelopoulos et al. 2021, appendix E."""
TUNING_SHARE = 0.2
NOTHING = -1.0
"""A threshold below every score -log p: nothing needs to be in."""


def fit_prediction_sets(
    posterior_or_probs: nn.Module | Posterior | Tensor | Any,
    dataset: Any = None,
    *,
    alpha: float = 0.1,
    method: SetMethod | SetScore = "lac",
    class_conditional: bool = False,
    groups: str | Sequence[Any] | None = None,
    promise: Promise = "coverage",
    allow_empty: bool = True,
    num_samples: int = 16,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    seed: int = 0,
) -> PredictionSets:
    """Calibrate sets of classes that hold the true class of at least 1 - alpha of the inputs to come.

    That holds at any number of rows, for any model and data, on average over the calibration rows, as long as these and
    the inputs to come are exchangeable and nothing was fitted to the rows: take rows that no training, temperature or
    choice of a posterior has seen.

    Args:
        posterior_or_probs: a posterior or model; or probabilities (n, C), of several labels (n, L).
        dataset: labelled rows: a `datasets.Dataset` or another dataset, or a DataLoader or list of batches; with
            probabilities the labels themselves: (n,), or (n, L) of 0 and 1. Rows labelled -100 are left out.
        alpha: the share of misses allowed, above 0 and below 1.
        method: "lac", "aps", "raps", or a `SetScore` with their options.
        class_conditional: hold it for each true class, or each label, by itself.
        groups: hold it for each group by itself: one per row, or the name of a column of ``dataset``.
        promise: "coverage"; of several labels also "fnr": the expected share of true labels that a set lacks is at most
            alpha.
        allow_empty: whether a set may be empty, which says that no class fits; otherwise the likeliest is in.
        num_samples: draws per prediction.
        batch_size: rows per batch.
        data_collator: makes a batch of rows; None: transformers' default.
        seed: of the draws, of the chance in randomised scores, and of the rows that choose the options of "raps".

    Returns:
        The sets; a warning says where rows are too few, and every class is in.

    Raises:
        TypeError: the dataset is none.
        ValueError: an argument is out of range, or the head has no classes of whole inputs.

    >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.7, 0.3]])
    >>> sets = fit_prediction_sets(probs, torch.tensor([0, 0, 0, 1]), alpha=0.4)
    >>> round(math.exp(-sets.cutoffs["all"].threshold), 4)  # all classes that are at least as probable
    0.4
    >>> sets.predict([[0.55, 0.45], [0.95, 0.05]])
    tensor([[ True,  True],
            [ True, False]])
    """
    alpha, score = check_alpha(alpha), method if isinstance(method, SetScore) else SetScore(method=method)
    check_choice("promise", promise, ("coverage", "fnr"))
    check_count("seed", seed, 0)
    if class_conditional and groups is not None:
        raise ValueError("`class_conditional` and `groups` exclude each other: give one of them.")
    given = calibration_rows(
        posterior_or_probs,
        dataset,
        groups,
        num_samples=num_samples,
        batch_size=batch_size,
        data_collator=data_collator,
        seed=seed,
    )
    rows = ClassRows.of(given.parts)
    _check_kind(rows, score, promise, class_conditional)
    keys: list[Hashable] = (
        [ALL] * len(rows.labels) if given.groups is None else group_keys(given.groups, len(rows.labels))
    )
    kept = rows.labelled().nonzero()[:, 0]
    rows, keys = rows.at(kept), [keys[number] for number in kept.tolist()]
    if score.method == "raps" and (score.penalty is None or score.k_reg is None):
        tuning = torch.from_numpy(np.random.default_rng([seed, 2]).random(len(keys)) < TUNING_SHARE)
        score = _chosen(rows.at(tuning), score, alpha)
        rows, keys = rows.at(~tuning), [key for key, out in zip(keys, tuning.tolist(), strict=True) if not out]
    scores = score.of_classes(rows.log_probs, seed, CALIBRATION)
    return PredictionSets(
        alpha=alpha,
        score=score,
        num_classes=rows.num_classes,
        problem_type=rows.problem_type,
        by="class" if class_conditional else "all" if groups is None else "group",
        promise=promise,
        allow_empty=allow_empty,
        cutoffs=_by_class(rows, scores, alpha) if class_conditional else _by_key(rows, scores, keys, alpha, promise),
        **given.how,
    )


def false_negative_threshold(scores: Tensor, labels: Tensor, alpha: float) -> float:
    """Return the smallest t at which leaving out scores above it misses few true labels, by conformal risk control.

    With R(t) the mean over n rows of the share of their true labels with a score above t (0 of a row without any), it
    is inf {t: (n R(t) + 1) / (n + 1) <= alpha}, and the expected share missed in a new row is at most alpha.

    Args:
        scores: of all labels, (n, L), at least 0.
        labels: which are true, (n, L).
        alpha: the bound.

    Returns:
        A score, -1 where even the empty set keeps the bound, or infinity where n is too small.

    >>> scores = torch.tensor([[0.1, 0.5], [0.3, 0.9], [0.2, 0.8]])
    >>> false_negative_threshold(scores, torch.tensor([[True, True], [True, False], [True, False]]), 0.4)
    0.30000001192092896
    """
    budget = alpha * (len(scores) + 1) - 1 + 1e-9
    if budget < 0:
        return math.inf
    weights = labels / labels.sum(1, keepdim=True).clamp_min(1).double()
    values, order = scores[labels].sort(descending=True)
    missed = weights[labels][order].cumsum(0)  # if all scores down to this one are left out
    # equal scores go together: what stays in is the first value whose every equal fits no more into the budget
    for value, total in zip(*_last_of_equal(values, missed), strict=True):
        if total > budget:
            return float(value)
    return NOTHING


def _last_of_equal(values: Tensor, totals: Tensor) -> tuple[list[float], list[float]]:
    is_last = torch.cat([values[1:] != values[:-1], values.new_ones(min(len(values), 1), dtype=torch.bool)])
    return values[is_last].tolist(), totals[is_last].tolist()


def _check_kind(rows: ClassRows, score: SetScore, promise: str, class_conditional: bool) -> None:
    if rows.is_multi_label and score.method != "lac":
        raise ValueError(f'`method` of several labels per row must be "lac", got {score.method!r}.')
    if promise == "fnr" and (not rows.is_multi_label or class_conditional):
        raise ValueError('`promise`="fnr" is for several labels per row, all classes together.')


def _by_key(rows: ClassRows, scores: Tensor, keys: list[Hashable], alpha: float, promise: str) -> Cutoffs:
    expected = [] if keys and keys[0] != ALL else [ALL]
    if promise == "fnr":
        return Cutoffs.of(
            lambda own: false_negative_threshold(scores[own], rows.labels[own], alpha), keys, alpha, expected
        )
    # a row without a true label is covered by any set
    worst = (
        scores.masked_fill(~rows.labels, NOTHING).amax(1) if rows.is_multi_label else true_scores(scores, rows.labels)
    )
    return Cutoffs.of(lambda own: conformal_quantile(worst[own], alpha), keys, alpha, expected)


def _by_class(rows: ClassRows, scores: Tensor, alpha: float) -> Cutoffs:
    """Of several labels, every label rests on the rows that have it."""
    if rows.is_multi_label:
        numbers, classes = rows.labels.nonzero(as_tuple=True)
    else:
        numbers, classes = torch.arange(len(rows.labels)), rows.labels
    own_scores = scores[numbers, classes]
    return Cutoffs.of(
        lambda own: conformal_quantile(own_scores[own], alpha), classes.tolist(), alpha, range(rows.num_classes)
    )


def _chosen(rows: ClassRows, score: SetScore, alpha: float) -> SetScore:
    """The options of "raps" that give the smallest sets on rows of their own, by the paper's two rules."""
    if not len(rows.labels):
        return replace(score, penalty=score.penalty or 0.0, k_reg=score.k_reg or 1)
    own = rows.log_probs.gather(1, rows.labels[:, None])
    ranks = (rows.log_probs > own).sum(1) + 1
    rank = conformal_quantile(ranks, alpha)
    k_reg = score.k_reg if score.k_reg is not None else int(min(rank, rows.num_classes))
    if score.penalty is not None:
        return replace(score, k_reg=k_reg)
    sizes = {}
    for penalty in PENALTIES:
        scores = class_scores(rows.log_probs, "raps", None, penalty, k_reg)
        sizes[penalty] = float((scores <= conformal_quantile(true_scores(scores, rows.labels), alpha)).sum())
    return replace(score, k_reg=k_reg, penalty=min(sizes, key=lambda penalty: sizes[penalty]))
