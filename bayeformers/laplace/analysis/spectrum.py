"""The eigenvalues of one layer's curvature, and the sums over them that the evidence is made of.

A large model has 10^7 to 10^8 of them: each sum is one pass over chunks, accumulated in float64, and never holds a
float64 copy of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Spectrum", "determined_weights", "log_determinant_ratio", "trace"]

_CHUNK = 2**18  # eigenvalues at a time: 2 MiB in float64, about a processor's cache


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What the evidence needs to know of one layer.

    Attributes:
        eigenvalues: L >= 0 of the layer's GGN before any scaling, of any shape: one for each weight.
        squared_norm: |theta* - mu0|^2 of the layer's weights, mu0 their prior mean.

    Raises:
        ValueError: no eigenvalue, one that is negative or not finite, or such a norm.
    """

    eigenvalues: Tensor
    squared_norm: float

    def __post_init__(self) -> None:
        values = self.eigenvalues
        if values.numel() == 0 or not values.is_floating_point():
            raise ValueError(
                f"`eigenvalues` must be floating point, one per weight, got {values.dtype} {tuple(values.shape)}."
            )
        low, high = (float(bound) for bound in values.aminmax())  # NaN propagates
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"`eigenvalues` must be finite and >= 0, got values from {low} to {high}.")
        if not (math.isfinite(self.squared_norm) and self.squared_norm >= 0):
            raise ValueError(f"`squared_norm` must be finite and >= 0, got {self.squared_norm!r}.")


def trace(eigenvalues: Tensor) -> float:
    """sum_i L_i."""
    return math.fsum(float(chunk.sum()) for chunk in _chunks(eigenvalues))


def log_determinant_ratio(eigenvalues: Tensor, ratio: float) -> float:
    """sum_i log(1 + ratio L_i), which is log det P - p log tau without its cancellation."""
    return math.fsum(float(chunk.mul_(ratio).log1p_().sum()) for chunk in _chunks(eigenvalues))


def determined_weights(eigenvalues: Iterable[Tensor], ratio: float) -> tuple[float, float]:
    """gamma = sum_i r_i and sum_i r_i (1 - r_i), its derivative in log ratio, for r = ratio L / (1 + ratio L)."""
    gamma, change = [], []
    for values in eigenvalues:
        for scaled in _chunks(values):
            scaled.mul_(ratio)
            free = (scaled + 1).reciprocal_()  # 1 - r
            share = scaled.mul_(free)
            gamma.append(float(share.sum()))
            change.append(float(share.dot(free)))
    return math.fsum(gamma), math.fsum(change)


def _chunks(eigenvalues: Tensor) -> Iterator[Tensor]:
    """New float64 tensors; the whole is never copied."""
    for chunk in torch.split(eigenvalues.detach().reshape(-1), _CHUNK):
        yield chunk.to(torch.float64, copy=True)
