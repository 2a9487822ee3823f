"""MOPED's initial scale of a weight: a share of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import is_real
from .diagonal_normal import MIN_SCALE

_INITIALIZER_RANGE = 0.02  # the usual initial standard deviation of a transformer's weights


@dataclass(frozen=True)
class InitialScale:
    """MOPED's initial scale as a function of the trained weight: delta * max(|w|, floor), elementwise.

    Krishnan et al. 2020 (arXiv 1906.05323), section 3; the floor keeps fresh biases and pruned weights uncertain.

    Attributes:
        delta: scale relative to |w|.
        floor: 0.1 mean|w| of the whole tensor; 0.02, or what is given, for an all-zero one. A scalar tensor.
    """

    delta: float
    floor: Tensor

    @classmethod
    def from_weight(
        cls, weight: Tensor, delta: float, padding_idx: int | None = None, floor_of_zeros: float | None = None
    ) -> InitialScale:
        """Return the rule for one tensor.

        Args:
            weight: all of the tensor's trained values, of any shape.
            delta: initial scale relative to |w|.
            padding_idx: row of ``weight`` that does not count in the mean of |w|; None: all rows do.
            floor_of_zeros: the floor of an all-zero tensor; None: 0.02.
        """
        total, count = _norm1(weight), weight.numel()
        if padding_idx is not None:
            total, count = total - _norm1(weight[padding_idx]), count - weight[padding_idx].numel()
        mean = total / max(count, 1)
        zeros = _INITIALIZER_RANGE if floor_of_zeros is None else floor_of_zeros
        return cls(delta, torch.where(mean > 0, 0.1 * mean, zeros))

    of = from_weight  # its name until 0.2

    def __call__(self, weight: Tensor) -> Tensor:
        """Scales of a part of that tensor, in float32 or wider: the shape of ``weight``."""
        scale = weight.detach().to(_wide_dtype(weight)).abs()
        return torch.maximum(scale, self.floor, out=scale).mul_(self.delta).clamp_min_(MIN_SCALE)


def check_delta(delta: float) -> float:
    """Return ``delta`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not finite or not > 0.
    """
    if not is_real(delta):
        raise TypeError(f"`delta` must be a number > 0, got {delta!r}.")
    if not (math.isfinite(delta) and delta > 0):
        raise ValueError(
            f"`delta` must be finite and > 0, got {delta!r}. It sets the initial posterior, scale = delta * |weight|; "
            "try 0.05, or name the layer in `exclude_modules` to keep it deterministic."
        )
    return float(delta)


def initial_scale(weight: Tensor, delta: float) -> Tensor:
    """Return MOPED's initial scale of a whole tensor: delta * max(|w|, 0.1 mean|w|), delta * 0.02 for an all-zero one.

    Shape: any -> the same, float32 or the wider dtype of ``weight``.

    >>> initial_scale(torch.tensor([1.0, -2.0, 0.0]), 0.1)
    tensor([0.1000, 0.2000, 0.0100])
    """
    return InitialScale.from_weight(weight, delta)(weight)


def _norm1(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight.detach(), ord=1, dtype=_wide_dtype(weight))
    return norm


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
