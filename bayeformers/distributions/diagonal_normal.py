"""The variational family: independent Gaussians, scale = max(softplus(rho), MIN_SCALE), in units of 1 or of |loc|."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

MIN_SCALE = 1e-8
"""Floor of every scale: one number for the draw and for the KL, so that both see the same posterior."""

ScaleName = Literal["additive", "multiplicative"]

_SMALL_RHO = 4.0  # up to here log(1 + exp(rho)) exceeds rho by far more than its rounding
LINEAR_FROM = 20.0  # softplus(rho) = rho beyond this, in float32 exactly


def scale_from_rho(rho: Tensor) -> Tensor:
    """Return the scale sigma = max(softplus(rho), MIN_SCALE), finite with finite gradients for rho in [-200, 200].

    Under the floor the slope is that at the floor, d log sigma / d rho = 1, so that a scale can leave it again.

    Shape: any -> the same.

    >>> scale_from_rho(torch.tensor([-200.0, 0.0, 200.0])).tolist()
    [9.99999993922529e-09, 0.6931471824645996, 200.0]
    """
    if not (rho.requires_grad and torch.is_grad_enabled()):
        return scale_into(None, rho)
    scale: Tensor = _Scale.apply(rho)  # type: ignore[no-untyped-call]
    return scale


def scale_slope(rho: Tensor) -> Tensor:
    """Return d sigma / d rho = sigmoid(rho), MIN_SCALE from the floor downwards: a new tensor of the same shape."""
    return slope_into(None, rho)


def scale_into(out: Tensor | None, rho: Tensor) -> Tensor:
    """Return :func:`scale_from_rho`, bit for bit but without a gradient, in the memory of ``out``, if any is given."""
    # as log1p(exp(rho)): `F.softplus` rounds differently in vectorised and in scalar code, so that a row of a table
    # would depend on where in a lookup it stands; these two functions do not
    return torch.clamp_max(rho, LINEAR_FROM, out=out).exp_().log1p_().clamp_min_(rho).clamp_min_(MIN_SCALE)


def block_scale_into(out: Tensor, rho: Tensor) -> Tensor:
    """:func:`scale_into` of a block of the CPU's memory, which is looked at first: most have no use for the limits."""
    low, high = torch.aminmax(rho)
    if low.item() > _MIN_RHO + 1 and high.item() < _SMALL_RHO:
        return torch.exp(rho, out=out).log1p_()
    return scale_into(out, rho)


def slope_into(out: Tensor | None, rho: Tensor) -> Tensor:
    """Return :func:`scale_slope` in the memory of ``out``, of the same shape and dtype, if any."""
    return torch.clamp_min(rho, _MIN_RHO, out=out).sigmoid_()


class _Scale(torch.autograd.Function):
    """Keeps rho alone, and a slope where `clamp_min` has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rho: Tensor) -> Tensor:
        return scale_into(None, rho)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rho,) = ctx.saved_tensors
        return scale_slope(rho) * grad


def rho_from_scale(scale: Tensor) -> Tensor:
    """Return the inverse of :func:`scale_from_rho`: rho = scale + log(1 - exp(-scale)), exact for tiny and large ones.

    Shape: any -> the same. Scales below ``MIN_SCALE`` are raised to it.

    >>> scale_from_rho(rho_from_scale(torch.tensor([0.05, 30.0])))
    tensor([ 0.0500, 30.0000])
    """
    scale = scale.clamp_min(MIN_SCALE)
    return scale + torch.log(-torch.expm1(-scale))


_MIN_RHO = float(rho_from_scale(torch.tensor(MIN_SCALE, dtype=torch.float64)))


def check_scale(scale: str) -> None:
    """Raise ValueError unless ``scale`` is a :data:`ScaleName`."""
    if scale not in get_args(ScaleName):
        raise ValueError(
            f"`scale` must be one of {list(get_args(ScaleName))}, got {scale!r}: sigma = softplus(rho), or "
            "softplus(rho) * |weight|."
        )


def unit_of(loc: Tensor, floor: Tensor) -> Tensor:
    """Return the unit of the multiplicative scale, sigma = unit * scale_from_rho(rho): max(|loc|, floor).

    So sigma^2 = alpha loc^2 with alpha = scale_from_rho(rho)^2. Kharitonov et al. 2018 (arXiv 1811.00596),
    but for the floor, under which sigma does not depend on loc: a weight at 0 stays uncertain. The derivative in loc is
    its sign above the floor, and 0 else.

    Shape: ``loc`` any, ``floor`` a scalar tensor > 0 -> that of ``loc``, in the wider dtype of the two.

    >>> unit_of(torch.tensor([-2.0, 0.0]), torch.tensor(0.1))
    tensor([2.0000, 0.1000])
    """
    size = loc.to(torch.promote_types(loc.dtype, floor.dtype)).abs()
    return torch.where(size > floor, size, floor)


@dataclass(frozen=True)
class DiagonalNormal:
    """Independent Gaussians N(loc, scale^2), one per weight.

    Args:
        loc: means, any shape.
        scale: standard deviations (never variances), broadcastable to ``loc``.

    >>> DiagonalNormal(torch.zeros(2), torch.ones(2)).log_prob(torch.zeros(2))
    tensor([-0.9189, -0.9189])
    """

    loc: Tensor
    scale: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density in nats, shape of ``value``."""
        standardised = (value - self.loc) / self.scale
        return -0.5 * (math.log(2 * math.pi) + standardised.square()) - self.scale.log()

    def entropy(self) -> Tensor:
        """Differential entropy in nats, summed over the weights: sum(log scale + log(2 pi e) / 2), a scalar."""
        return self.scale.expand_as(self.loc).log().sum() + 0.5 * math.log(2 * math.pi * math.e) * self.loc.numel()

    def rsample(self, noise: Tensor) -> Tensor:
        """Return loc + scale * noise, differentiable in loc and scale; ``noise`` ~ N(0, 1) of the shape of ``loc``."""
        return self.loc + self.scale * noise
