"""A regression's Gaussian noise: one standard deviation for all inputs, or what a variance head predicts."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor

from ..checks import is_finite
from .gaussian import split_variance_head

__all__ = ["HEAD", "NoiseStd", "check_noise_std", "mean_and_variance", "squeezed"]

HEAD: Literal["head"] = "head"
NoiseStd = float | Literal["head"]
"""A standard deviation > 0 in the targets' unit, or "head": the model predicts L means, then L log variances."""


def check_noise_std(noise_std: Any) -> NoiseStd | None:
    """``noise_std`` if it is one, or None.

    Raises:
        ValueError: otherwise.
    """
    if noise_std is None or (isinstance(noise_std, str) and noise_std == HEAD):
        return cast("NoiseStd | None", noise_std)
    if not (is_finite(noise_std) and noise_std > 0):
        raise ValueError(f'`noise_std` must be finite and > 0, or "head", got {noise_std!r}.')
    return float(noise_std)


def mean_and_variance(output: Tensor) -> tuple[Tensor, Tensor]:
    """Means and noise variances of a variance head's output (..., 2 L): (..., L) each, or (...) for L = 1.

    Raises:
        ValueError: an odd number of columns.

    >>> import torch
    >>> mean_and_variance(torch.tensor([[1.5, 0.0]]))
    (tensor([1.5000]), tensor([1.]))
    """
    mean, log_variance = split_variance_head(output)
    return squeezed(mean), squeezed(log_variance.exp())


def squeezed(values: Tensor) -> Tensor:
    """(..., L) -> (...) for L = 1, as regression values are kept."""
    return values.squeeze(-1) if values.dim() > 1 and values.shape[-1] == 1 else values
