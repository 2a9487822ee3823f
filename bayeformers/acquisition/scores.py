r"""What a label of one row would tell, from draws that are one set of networks for all rows; in nats, in float64.

Notation: p_s(y | x) of draws w_1 .. w_S, p = mean_s p_s. Functions of classes take ``log_probs`` (S, N, C) and return
one score per row, (N,); a higher score is a row to label sooner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..metrics import uncertainty

__all__ = ["bald", "entropy", "epig", "margin", "normalized"]

_ELEMENTS = 2**22  # of a temporary tensor, 32 MB in float64


def bald(log_probs: Tensor) -> Tensor:
    r"""Return I(y; w | x) = H[p] - mean_s H[p_s] >= 0: what a label would tell of the weights.

    Houlsby et al. 2011 (arXiv 1112.5745), eq. 2; Gal et al. 2017 (arXiv 1703.02910), eq. 1.

    Args:
        log_probs: (S, ..., C).

    Returns:
        (...), at most min(log S, log C).

    >>> bald(torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log())
    tensor([0.3681], dtype=torch.float64)
    """
    return uncertainty.mutual_information(log_probs.double())


def entropy(log_probs: Tensor) -> Tensor:
    """Return H[p], (S, ..., C) -> (...): noise of the labels counts as much as what was not learned."""
    return uncertainty.predictive_entropy(log_probs.double())


def margin(log_probs: Tensor) -> Tensor:
    """Return p of the second class less p of the first, (S, ..., C) -> (...), in [-1, 0] (Scheffer et al. 2001)."""
    first, second = log_probs.double().exp().mean(0).topk(2, dim=-1).values.unbind(-1)
    return second - first


def epig(log_probs: Tensor, target_log_probs: Tensor) -> Tensor:
    r"""Return mean_t I(y; y_t | x, x_t): what a label would tell of the labels of the targets.

    With p(y, y_t) = mean_s p_s(y | x) p_s(y_t | x_t). Bickford Smith et al. 2023 (arXiv 2304.08151), eq. 6 and 8.

    Args:
        log_probs: of the rows, (S, N, C).
        target_log_probs: of the targets under the same draws, (S, T, C).

    Returns:
        (N,); never above `bald`.

    >>> draws = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log()
    >>> agreed = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]]).log()  # nothing is to be learned of this target
    >>> epig(draws, draws), epig(draws, agreed)
    (tensor([0.2217], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    probs, targets = normalized(log_probs), normalized(target_log_probs)
    num_draws, num_rows, num_classes = probs.shape
    rows = probs.flatten(1).T / num_draws  # (N C, S)
    total = probs.new_zeros(num_rows)
    size = max(1, _ELEMENTS // (num_rows * num_classes * targets.shape[-1]))
    for part in torch.split(targets, size, dim=1):
        joint = (rows @ part.flatten(1)).reshape(num_rows, num_classes, part.shape[1], -1)
        of_targets = torch.special.entr(part.mean(0)).sum()
        total += of_targets - torch.special.entr(joint).sum((1, 2, 3))
    own: Tensor = torch.special.entr(probs.mean(0)).sum(-1)
    return (own + total / targets.shape[1]).clamp_min(0)


def normalized(log_probs: Tensor) -> Tensor:
    """Return probabilities in float64 that sum to 1 over the last axis, to its rounding."""
    return log_probs.double().softmax(-1)
