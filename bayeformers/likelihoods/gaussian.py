r"""The Gaussian likelihood of a network that predicts its own noise: a variance head.

For L targets such a head has 2 L outputs: the first L columns are the means m, the last L the log variances v of
N(m, exp(v)). v is clamped to ``LOG_VARIANCE_RANGE``, i.e. a standard deviation between 4.5e-5 and 2.2e4 in the targets'
unit (standardise targets that are far from 1); outside of it its gradient is 0. Nix & Weigend 1994; Kendall & Gal
2017, arXiv 1703.04977.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["LOG_VARIANCE_RANGE", "gaussian_nll", "split_variance_head"]

LOG_VARIANCE_RANGE = (-20.0, 20.0)
_REDUCTIONS = ("mean", "sum", "none")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in the wider dtype that it has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def split_variance_head(output: Tensor) -> tuple[Tensor, Tensor]:
    """Means and clamped log variances, (..., L) each, of ``output`` (..., 2 L), in float32 or wider.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: an odd number of columns.

    >>> import torch
    >>> split_variance_head(torch.tensor([[1.0, 2.0, 0.0, 50.0]]))
    (tensor([[1., 2.]]), tensor([[ 0., 20.]]))
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(f"`output` must be a floating-point tensor, got {getattr(output, 'dtype', type(output))}.")
    if output.dim() == 0 or output.shape[-1] == 0 or output.shape[-1] % 2:
        raise ValueError(
            "`output` of a variance head must have 2 L columns, L means and then L log variances, got shape "
            f"{tuple(output.shape)}: set `num_labels` to twice the number of targets."
        )
    mean, log_variance = wide(output).chunk(2, dim=-1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def gaussian_nll(output: Tensor, target: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    r"""-log N(y; m, exp(v)) = (y - m)^2 exp(-v) / 2 + v / 2 + log(2 pi) / 2, summed over an example's L targets.

    Args:
        output: (B, 2 L): m, then v.
        target: y, (B, L); (B,) for L = 1.
        reduction: over examples: "mean", "sum" or "none", (B,).

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.

    >>> import torch
    >>> gaussian_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))  # log(2 pi) / 2
    tensor(0.9189)
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {_REDUCTIONS}, got {reduction!r}.")
    mean, log_variance = split_variance_head(output)
    if mean.dim() != 2:
        raise ValueError(f"`output` must have shape (B, 2 L), got {tuple(output.shape)}.")
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a tensor, got {type(target).__name__}.")
    if target.shape != mean.shape and (mean.shape[1] > 1 or target.shape != mean.shape[:1]):
        raise ValueError(f"`target` must have shape {tuple(mean.shape)}, got {tuple(target.shape)}.")
    target = target.to(mean).reshape(mean.shape)
    if not bool(target.isfinite().all()):
        raise ValueError("`target` must be finite.")
    residual = (target - mean) * (-0.5 * log_variance).exp()
    values = (0.5 * (residual.square() + log_variance) + 0.5 * math.log(2 * math.pi)).sum(1)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()
