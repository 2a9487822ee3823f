r"""Soft counts of a two-by-two table: was a prediction right, and was it certain?

Every item has a degree of rightness a and of certainty k, both in [0, 1], and belongs to one of four groups: right or
wrong, certain or uncertain. A group's soft count sums, over its own items only,

| | certain | uncertain |
| --- | --- | --- |
| right | n_AC = sum a k | n_AU = sum a (1 - k) |
| wrong | n_IC = sum (1 - a) k | n_IU = sum (1 - a) (1 - k) |

The aligned counts n_AC + n_IU should be large. Which group an item is in has no gradient; the degrees have. All four
losses of this package are this table with their own a and k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import is_finite, is_real

__all__: list[str] = []

EPS = 0.01
"""Added to both sums, so that empty groups (a batch of one) give finite losses and gradients."""


def alignment_sums(is_right: Tensor, is_certain: Tensor, rightness: Tensor, certainty: Tensor) -> tuple[Tensor, Tensor]:
    """Return n_AC + n_IU and n_AU + n_IC: scalars, or (T,) each for T thresholds of certainty.

    Args:
        is_right: which of the n items are right, bool (n,).
        is_certain: which are certain, bool (n,), or (T, n) for T thresholds.
        rightness: the degree a in [0, 1], (n,).
        certainty: the degree k in [0, 1], (n,).
    """
    right = torch.where(is_right, rightness, 1 - rightness)
    weight = right * torch.where(is_certain, certainty, 1 - certainty)
    is_aligned = is_certain == is_right
    zero = weight.new_zeros(())
    return torch.where(is_aligned, weight, zero).sum(-1), torch.where(is_aligned, zero, weight).sum(-1)


def alignment_loss(aligned: Tensor, misaligned: Tensor, eps: float) -> Tensor:
    """Return log(1 + (misaligned + eps) / (aligned + eps)) >= 0.

    Args:
        aligned: the soft count n_AC + n_IU, a scalar.
        misaligned: the soft count n_AU + n_IC, a scalar.
        eps: a number > 0 for a loss that is finite without any aligned item.
    """
    return torch.log1p((misaligned + eps) / (aligned + eps))


def check_eps(eps: float) -> None:
    """Raise ValueError unless ``eps`` is finite and > 0."""
    if not (is_finite(eps) and eps > 0):
        raise ValueError(f"`eps` must be a finite number > 0, got {eps!r}: it keeps empty groups finite.")


def check_threshold(name: str, value: float | Tensor) -> None:
    """Raise TypeError or ValueError unless it is a finite number or 0-dimensional tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"`{name}` must be one number, got a tensor of shape {tuple(value.shape)}.")
        value = float(value)
    if not is_real(value):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
