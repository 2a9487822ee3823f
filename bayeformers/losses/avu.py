r"""Accuracy versus uncertainty: losses that ask a classifier to be certain where it is right, uncertain where wrong.

With p = mean_s softmax(z_s) of the draws, c = max_k p_k, u the uncertainty in nats, and an item right if argmax p is
its label and certain if u <= threshold, the soft counts of :mod:`~bayeformers.losses.alignment` have a = c and
k = 1 - tanh(u):

    n_AC = sum c (1 - tanh u)            n_AU = sum c tanh u
    n_IC = sum (1 - c) (1 - tanh u)      n_IU = sum (1 - c) tanh u

Krishnan & Tickoo 2020, arXiv 2012.07923. Both losses belong beside a likelihood, with a weight: alone they have no
notion of a label's probability. Everything is computed in float32 or wider; the loss is a scalar with finite gradient
for any batch, all-right, all-wrong and one-hot ones included.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..checks import is_whole
from ..forward import IGNORED, wide
from ..likelihoods.classes import check_classes
from ..metrics.uncertainty import mutual_information, predictive_entropy
from .alignment import EPS, alignment_loss, alignment_sums, check_eps, check_threshold

__all__ = ["UNCERTAINTIES", "Uncertainty", "auavu_loss", "avuc_loss", "confidence_and_uncertainty"]

Uncertainty = Literal["predictive_entropy", "mutual_information"]
UNCERTAINTIES: tuple[Uncertainty, ...] = get_args(Uncertainty)

NUM_THRESHOLDS = 21


def avuc_loss(
    logits: Tensor,
    labels: Tensor,
    threshold: float | Tensor,
    *,
    uncertainty: Uncertainty = "predictive_entropy",
    eps: float = EPS,
) -> Tensor:
    r"""AvUC = log(1 + (n_AU + n_IC + eps) / (n_AC + n_IU + eps)), a scalar >= 0.

    Args:
        logits: (S, ..., C) of S draws, or (..., C) of one; log-probabilities are logits too. Probabilities are averaged
            over draws, never logits.
        labels: (...) integer classes; items of -100 do not count.
        threshold: certain is u <= threshold, in nats: a number in [0, log C], usually the mean of the mean uncertainty
            of right predictions and that of wrong ones.
        uncertainty: u: "predictive_entropy" of p, or "mutual_information" of the draws (0 for one draw).
        eps: > 0, added to both sums.

    Returns:
        The loss; a TypeError or ValueError names an argument of another type, shape or range.

    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.2, 0.0]])  # two certain, one uncertain
    >>> avuc_loss(logits, torch.tensor([0, 1, 1]), threshold=0.4)   # the uncertain one is wrong: as it should be
    tensor(0.0055)
    >>> avuc_loss(logits, torch.tensor([0, 0, 0]), threshold=0.4)   # a certain one is wrong, the uncertain one right
    tensor(0.3927)
    """
    check_eps(eps)
    check_threshold("threshold", threshold)
    is_right, confidence, spread = confidence_and_uncertainty(logits, labels, uncertainty)
    aligned, misaligned = alignment_sums(is_right, spread <= threshold, confidence, 1 - spread.tanh())
    return alignment_loss(aligned, misaligned, eps)


def auavu_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    uncertainty: Uncertainty = "predictive_entropy",
    num_thresholds: int = NUM_THRESHOLDS,
    eps: float = EPS,
) -> Tensor:
    """Return AUAvU = -log area, with the area under the soft AvU(t) by the trapezoid rule: a scalar >= 0, no threshold.

    AvU(t) = (n_AC + n_IU + eps) / (n_AC + n_AU + n_IC + n_IU + 2 eps) at thresholds t evenly spaced from the batch's
    smallest to its largest uncertainty and rescaled to [0, 1]. The metric with hard counts is
    :func:`~bayeformers.metrics.accuracy_vs_uncertainty`. What is refused is as for :func:`avuc_loss`.

    Args:
        logits: (S, ..., C) of S draws, or (..., C) of one; log-probabilities are logits too.
        labels: (...) integer classes; items of -100 do not count.
        uncertainty: u: "predictive_entropy" of p, or "mutual_information" of the draws (0 for one draw).
        num_thresholds: the number of thresholds t, >= 2.
        eps: > 0, added to both sums.

    Raises:
        ValueError: there are fewer than two thresholds.

    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.2, 0.0]])
    >>> auavu_loss(logits, torch.tensor([0, 1, 1])), auavu_loss(logits, torch.tensor([0, 0, 0]))
    (tensor(0.0081), tensor(0.3825))
    """
    check_eps(eps)
    if not is_whole(num_thresholds) or num_thresholds < 2:
        raise ValueError(f"`num_thresholds` must be a whole number >= 2, got {num_thresholds!r}.")
    is_right, confidence, spread = confidence_and_uncertainty(logits, labels, uncertainty)
    is_certain = spread <= _thresholds(spread.detach(), num_thresholds)[:, None]
    aligned, misaligned = alignment_sums(is_right, is_certain, confidence, 1 - spread.tanh())
    values = (aligned + eps) / (aligned + misaligned + 2 * eps)
    area = ((values[1:] + values[:-1]) / 2).mean()  # a sum over steps of equal width 1 / (T - 1)
    return -area.log()


def confidence_and_uncertainty(
    logits: Tensor, labels: Tensor, uncertainty: Uncertainty = "predictive_entropy"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (whether right, c, u), each (n,), of the n items with a label; c is a probability, u in nats.

    What is refused is as for :func:`avuc_loss`.

    Args:
        logits: (S, ..., C) of S draws, or (..., C) of one.
        labels: (...) integer classes; items of -100 are left out.
        uncertainty: u: "predictive_entropy" of p, or "mutual_information" of the draws (0 for one draw).
    """
    draws = _checked(logits, labels, uncertainty)
    is_item = labels.flatten() != IGNORED
    draws = wide(draws.reshape(draws.shape[0], -1, draws.shape[-1])[:, is_item])
    # A class that is excluded (-inf) keeps probability 0 and gets a gradient of 0 in place of inf - inf.
    log_probs = draws.clamp_min(torch.finfo(draws.dtype).min / 2).log_softmax(-1)
    confidence, decision = (log_probs.logsumexp(0) - math.log(len(log_probs))).max(-1)
    if not log_probs.numel():
        spread = confidence
    elif uncertainty == "mutual_information":
        spread = mutual_information(log_probs)
    else:
        spread = predictive_entropy(log_probs)
    return decision == labels.flatten()[is_item], confidence.exp(), spread


def _thresholds(spread: Tensor, count: int) -> Tensor:
    """(T,); the last is the maximum to the bit, as rounding must not leave the most uncertain item above it."""
    if not spread.numel():
        return spread.new_zeros(count)
    steps = torch.linspace(0, 1, count, dtype=spread.dtype, device=spread.device)
    return torch.lerp(spread.min(), spread.max(), steps)


def _checked(logits: Tensor, labels: Tensor, uncertainty: str) -> Tensor:
    """``logits`` with a draw axis."""
    if uncertainty not in UNCERTAINTIES:
        raise ValueError(f"`uncertainty` must be one of {UNCERTAINTIES}, got {uncertainty!r}.")
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    if not logits.is_floating_point():
        raise TypeError(f"`logits` must be floating-point, got {logits.dtype}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"`labels` must be integer classes, got {labels.dtype}.")
    draws = logits[None] if logits.dim() == labels.dim() + 1 else logits
    if draws.dim() != labels.dim() + 2 or draws.shape[1:-1] != labels.shape:
        raise ValueError(
            f"`logits` must have shape (S, ..., C) or (..., C) for `labels` of shape (...) = {tuple(labels.shape)}, "
            f"got {tuple(logits.shape)}."
        )
    if len(draws) == 0 or draws.shape[-1] < 2:
        raise ValueError(f"`logits` need at least one draw and two classes, got shape {tuple(logits.shape)}.")
    if bool(logits.isnan().any()):
        raise ValueError("`logits` must not be NaN.")
    check_classes(labels, draws.shape[1:], labels != IGNORED)
    return draws
