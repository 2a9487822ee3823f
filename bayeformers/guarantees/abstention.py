"""`fit_abstention`: from calibration rows to the threshold that answers the most inputs at a certified risk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..checks import check_count, is_real
from ..posteriors import Posterior
from ..posteriors.predict import as_posterior
from ..predictive import Predictive
from .bounds import check_share, error_allowance, least_examples, smallest_refusal
from .policy import PREDICTED, AbstentionPolicy
from .rows import check_order, predicted_rows
from .saving import settings_of, weights_digest
from .scores import errors_of, score_of

__all__ = ["certified_threshold", "fit_abstention"]

logger = logging.getLogger(__name__)

Errors = float | Sequence[float] | Tensor | NDArray[Any] | Callable[[Predictive, Any], Tensor]


def fit_abstention(
    posterior_or_scores: nn.Module | Posterior | Predictive | Tensor | Sequence[float],
    dataset: Any = None,
    *,
    max_risk: float = 0.05,
    confidence: float = 0.9,
    score: str = "confidence",
    groups: str | Sequence[Hashable] | Tensor | None = None,
    errors: Errors | None = None,
    num_samples: int = 16,
    method: str | None = None,
    batch_size: int = 32,
    data_collator: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
) -> AbstentionPolicy:
    """Find from which score on a model may answer, so that few of its answers are wrong, with a guarantee.

    With probability at least ``confidence`` over the draw of the calibration rows, at most ``max_risk`` of the answers
    are wrong, among inputs that are drawn independently from where the rows were; see
    :mod:`~bayeformers.guarantees.bounds`. Nothing else is assumed: not that probabilities are calibrated, nor that
    errors become rarer as the score rises. Rows that the model was trained on, or chosen by, do not count as such.

    Where the target cannot be met by these rows the policy refuses everything, and a warning says why.

    Args:
        posterior_or_scores: a model or posterior, which predicts the ``dataset``; or a `Predictive`, or numbers that
            are higher for the surer, (n,), or (n, T) of n texts with T tokens: then ``errors`` are needed.
        dataset: labelled calibration rows: a `datasets.Dataset` or another dataset, or a DataLoader or list of batches.
        max_risk: the largest share of wrong answers among those given, above 0 and below 1.
        confidence: the probability of the promise, above 0 and below 1. With groups it is that of each group.
        score: of `SCORES`; any word where scores are given as numbers.
        groups: a column of the dataset, or one entry per row: each group then has a threshold of its own, and a promise
            of its own at its own number of rows. "predicted": the predicted class. Unknown groups are refused.
        errors: what a wrong answer is; None: as `errors_of` says. A number is a regression's tolerance; an array has
            one entry per row, a function gives (B,) of a prediction and its batch. 0 or 1, or losses in between: these
            are rounded to 0 or 1 at random, with themselves as probability, so that the bound stays exact.
        num_samples: draws of each prediction, as it will be used.
        method: how the posterior predicts; None: its default.
        batch_size: of rows that come one by one.
        data_collator: makes a batch of rows; None: transformers' default.
        seed: of the draws, and of the one token that is taken of each text (tokens of one text are not independent).

    Returns:
        The policy; it is not attached to the model yet, see `attach_policy`.

    Raises:
        TypeError: no model, posterior, prediction or numbers; a dataset of another kind.
        ValueError: an argument is out of range, there is no row with a label, or errors do not fit the scores.

    >>> wrong = torch.arange(400) % 4 == 3          # a quarter of the answers,
    >>> scores = torch.rand(400).where(wrong, 1.0)  # which are less sure than the others
    >>> policy = fit_abstention(scores, errors=wrong.double())
    >>> policy.coverage >= 0.75, policy.feasible, round(policy.smallest_refusal, 3)
    (True, True, 0.211)
    """
    check_share("max_risk", max_risk)
    check_share("confidence", confidence)
    check_count("num_samples", num_samples, 1)
    check_count("batch_size", batch_size, 1)
    check_count("seed", seed, 0)
    posterior: Posterior | None = None
    # a Predictive first: the check of the protocol reads its properties, some of which a head may not have
    if not isinstance(posterior_or_scores, Predictive) and isinstance(posterior_or_scores, Posterior | nn.Module):
        posterior = as_posterior(posterior_or_scores)
        rows = _of_posterior(
            posterior, dataset, score, groups, errors,
            {"num_samples": num_samples, "method": method, "seed": seed}, batch_size, data_collator,
        )  # fmt: skip
    else:
        if dataset is not None:
            raise ValueError(
                "`dataset` goes with a model or posterior: of given scores leave it out, and give `errors`."
            )
        rows = _of_scores(posterior_or_scores, score, groups, errors)
    rows = rows.independent(seed)
    facts = {"score": score, "max_risk": float(max_risk), "confidence": float(confidence)}
    if posterior is not None:
        facts |= {
            "method": method if method is not None else getattr(posterior, "default_method", None),
            "num_samples": num_samples,
            "posterior": type(posterior).__name__,
            "weights": weights_digest(posterior.model),
            "settings": settings_of(posterior),
        }
    group_by = groups if isinstance(groups, str) else (None if groups is None else "group")
    return _policy(rows, {**facts, "group_by": group_by}, max_risk, confidence)


def certified_threshold(
    scores: NDArray[np.float64], errors: NDArray[np.float64], max_risk: float = 0.05, confidence: float = 0.9
) -> float:
    """Return the least threshold whose answers are certified, by rows that are independent; +inf: none is.

    Args:
        scores: (n,), higher for the surer; rows with NaN are never answered.
        errors: (n,), 0 or 1.
        max_risk: the largest share of wrong answers.
        confidence: the probability of the promise.

    Returns:
        The threshold: in the middle between two neighbouring scores; -inf: all are answered.

    >>> round(certified_threshold(np.linspace(1, 0, 100), np.arange(100) >= 60), 4)
    0.399
    """
    allowed = error_allowance(len(scores), max_risk, confidence)
    is_number = ~np.isnan(scores)
    values, wrong = scores[is_number].astype(np.float64), errors[is_number]
    order = np.argsort(-values, kind="stable")
    values, counts = values[order], np.cumsum(wrong[order])
    is_last = np.append(values[:-1] > values[1:], True)[: len(values)]  # of equal scores: they are answered together
    certified = np.flatnonzero(is_last & (counts <= allowed[1 : len(values) + 1]))
    if not len(certified):
        return math.inf
    last = int(certified[-1])
    if last + 1 == len(values):
        return -math.inf
    middle = 0.5 * (values[last] + values[last + 1])  # far from both, where other roundings would decide
    return float(middle if values[last + 1] < middle < values[last] else values[last])


@dataclass(frozen=True, eq=False)
class _Rows:
    """Calibration rows: scores and errors (n,) or (n, ...), NaN where no label counts, and each row's group."""

    scores: NDArray[np.float64]
    errors: NDArray[np.float64]
    groups: list[Any] | None = None

    def independent(self, seed: int) -> _Rows:
        """One scored answer per row: of the tokens of a text one at random; losses rounded at random to 0 or 1."""
        generator = np.random.default_rng(seed)
        scores, errors = self.scores, self.errors
        groups = None if self.groups is None else np.array(self.groups, dtype=object)
        if scores.ndim > 1:
            scores, errors = scores.reshape(len(scores), -1), errors.reshape(len(errors), -1)
            places = np.where(np.isnan(errors), -1.0, generator.random(errors.shape)).argmax(1)
            scores, errors = (part[np.arange(len(part)), places] for part in (scores, errors))
            groups = groups.reshape(len(scores), -1) if groups is not None else None
            if groups is not None:
                groups = groups[np.arange(len(groups)), places if groups.shape[1] > 1 else 0]
        counts = ~np.isnan(errors)
        if not counts.any():
            raise ValueError("`dataset` or `errors` hold no label that counts: there is nothing to calibrate on.")
        if ((errors[counts] < 0) | (errors[counts] > 1)).any():
            raise ValueError(f"`errors` must be in [0, 1], got {errors[counts].min():g} to {errors[counts].max():g}.")
        rounded = (generator.random(len(errors)) < errors).astype(np.float64)
        return _Rows(scores[counts], rounded[counts], None if groups is None else groups[counts].tolist())


def _policy(rows: _Rows, facts: dict[str, Any], max_risk: float, confidence: float) -> AbstentionPolicy:
    risk = float(rows.errors.mean())
    refusal = smallest_refusal(risk, max_risk)
    if refusal > 0:
        logger.warning(
            "The model is wrong on %.1f %% of the %d calibration rows: to keep %.3g %%, any rule must refuse at least "
            "%.1f %% of such inputs.", 100 * risk, len(rows.errors), 100 * max_risk, 100 * refusal,
        )  # fmt: skip
    if rows.groups is None:
        thresholds = None
        threshold = certified_threshold(rows.scores, rows.errors, max_risk, confidence)
        limits = np.full(len(rows.scores), threshold)
    else:
        names = np.array([rows.groups.index(group) for group in rows.groups])
        thresholds, threshold, limits = {}, math.inf, np.full(len(names), math.inf)
        for first in np.unique(names):
            own = names == first
            found = certified_threshold(rows.scores[own], rows.errors[own], max_risk, confidence)
            thresholds[rows.groups[first]], limits[own] = found, found
    is_answered = rows.scores >= limits
    policy = AbstentionPolicy(
        **facts,
        threshold=threshold,
        groups=thresholds,
        num_examples=len(rows.errors),
        coverage=float(is_answered.mean()),
        feasible=bool(is_answered.any()),
        model_risk=risk,
        smallest_refusal=refusal,
    )
    _tell(policy, rows)
    return policy


def _tell(policy: AbstentionPolicy, rows: _Rows) -> None:
    """Warn where the policy, or a group of it, refuses everything."""
    least = least_examples(policy.max_risk, policy.confidence)
    if not policy.feasible:
        few = len(rows.errors) < least
        why = (
            f"at least {least} are needed even of a model that makes no error"
            if few
            else "the surest of them have too many errors; more rows, or a better score, may help"
        )
        logger.warning(
            "No threshold on %r is certified to keep the risk at most %.3g with confidence %.3g by %d calibration rows"
            " (%s): the policy refuses every input.",
            policy.score, policy.max_risk, policy.confidence, len(rows.errors), why,
        )  # fmt: skip
    elif policy.groups is not None and math.inf in policy.groups.values():
        refused = [group for group, threshold in policy.groups.items() if threshold == math.inf]
        logger.warning(
            "The groups %s (%d of %d) are refused altogether: each needs at least %d rows of its own, with few errors.",
            refused[:5], len(refused), len(policy.groups), least,
        )  # fmt: skip


def _of_scores(given: Any, score: str, groups: Any, errors: Any) -> _Rows:
    found_groups = groups
    if isinstance(given, Predictive):
        if groups == PREDICTED and isinstance(groups, str):
            found_groups = _predicted_classes(given, score_of(given, score).shape)
        scores = _array("posterior_or_scores", score_of(given, score))
    else:
        scores = _array("posterior_or_scores", given)
    if isinstance(found_groups, str):
        raise ValueError(f"`groups`={groups!r} names no column of scores: give one entry per score.")
    if errors is None or callable(errors) or is_real(errors):
        raise ValueError("`errors` must have one entry per score, 0 or 1, where scores are given in place of a model.")
    wrong = _array("errors", errors)
    if wrong.shape != scores.shape or not scores.size:
        raise ValueError(
            f"`errors` must have the scores' shape, {scores.shape}, and one row at least, got {wrong.shape}."
        )
    return _Rows(scores, wrong, None if found_groups is None else _listed(found_groups, len(scores), scores.size))


def _of_posterior(
    posterior: Posterior,
    dataset: Any,
    score: str,
    groups: Any,
    errors: Any,
    options: Mapping[str, Any],
    batch_size: int,
    data_collator: Any,
) -> _Rows:
    check_order(dataset, errors=errors, groups=groups)
    column = groups if isinstance(groups, str) and groups != PREDICTED else None
    scores, wrong, predicted, names = [], [], [], []
    is_array = errors is not None and not callable(errors) and not is_real(errors)
    for batch, labels, values in predicted_rows(posterior.model, dataset, batch_size, data_collator, column):
        predictive = posterior.predict(batch, **options)
        scores.append(_array("scores", score_of(predictive, score)))
        names += values
        if groups == PREDICTED and isinstance(groups, str):
            predicted.append(_array("groups", _predicted_classes(predictive, scores[-1].shape)))
        if callable(errors):
            wrong.append(_array("errors", errors(predictive, batch)))
        elif not is_array:
            wrong.append(_array("errors", errors_of(predictive, labels, errors)))
    joined = _joined(scores)
    found = _array("errors", errors) if is_array else _joined(wrong)
    if found.shape != joined.shape:
        raise ValueError(f"`errors` must have the scores' shape, {joined.shape}, got {found.shape}.")
    if groups is None:
        return _Rows(joined, found)
    if column is not None:
        return _Rows(joined, found, names)
    own = _joined(predicted).astype(int).tolist() if predicted else groups
    return _Rows(joined, found, _listed(own, len(joined), joined.size))


def _predicted_classes(predictive: Predictive, shape: Sequence[int]) -> Tensor:
    """The class of each scored answer; ValueError where an answer is of several decisions."""
    classes = predictive.mean_log_probs.argmax(-1)
    if tuple(classes.shape) != tuple(shape):
        raise ValueError(
            f"`groups`={PREDICTED!r} needs one predicted class for each answer, got a {predictive.problem_type!r} "
            "head, whose answers are several decisions: give one entry per row."
        )
    return classes


def _joined(parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Batches behind one another; shorter texts are padded with NaN, which counts for nothing."""
    shape = np.max([part.shape[1:] for part in parts], axis=0)
    widths = [[(0, 0), *((0, int(n)) for n in shape - np.array(part.shape[1:], dtype=int))] for part in parts]
    return np.concatenate([np.pad(p, w, constant_values=np.nan) for p, w in zip(parts, widths, strict=True)])


def _array(name: str, values: Any) -> NDArray[np.float64]:
    try:
        found = torch.as_tensor(values).detach().cpu().double().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` must be numbers, (n,){', a model or a posterior' if name.startswith('post') else ''}, got "
            f"{type(values).__name__}."
        ) from error
    if found.ndim == 0:
        raise ValueError(f"`{name}` must have one entry per row, got the number {found.item():g}.")
    return np.asarray(found)


def _listed(groups: Any, count: int, size: int) -> list[Any]:
    names = groups.tolist() if isinstance(groups, Tensor | np.ndarray) else list(groups)
    flat = np.array(names, dtype=object)
    if len(names) != count or flat.size not in (count, size):
        raise ValueError(f"`groups` must have one entry per row, {count}, got {len(names)}.")
    return names
