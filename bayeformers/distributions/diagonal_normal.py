"""The variational family: independent Gaussians, scale = max(softplus(rho), MIN_SCALE)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 1e-8
"""Floor of every scale: one number for the draw and for the KL, so that both see the same posterior."""

LINEAR_FROM = 20.0  # softplus(rho) = rho beyond this, in float32 exactly


def scale_from_rho(rho: Tensor) -> Tensor:
    """Scale sigma = max(softplus(rho), MIN_SCALE), finite with finite gradients for rho in [-200, 200].

    Written as log1p(exp(rho)): `F.softplus` rounds differently in vectorised and in scalar code, so that a row of a
    table would depend on where in a lookup it stands; these two functions do not.

    Shape: any -> the same.

    >>> scale_from_rho(torch.tensor([-200.0, 0.0, 200.0])).tolist()
    [9.99999993922529e-09, 0.6931471824645996, 200.0]
    """
    return torch.maximum(rho, rho.clamp_max(LINEAR_FROM).exp().log1p()).clamp_min(MIN_SCALE)


def rho_from_scale(scale: Tensor) -> Tensor:
    """Inverse of :func:`scale_from_rho`: rho = scale + log(1 - exp(-scale)), exact for tiny and for large scales.

    Shape: any -> the same. Scales below ``MIN_SCALE`` are raised to it.

    >>> scale_from_rho(rho_from_scale(torch.tensor([0.05, 30.0])))
    tensor([ 0.0500, 30.0000])
    """
    scale = scale.clamp_min(MIN_SCALE)
    return scale + torch.log(-torch.expm1(-scale))


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
        """loc + scale * noise, differentiable in loc and scale; ``noise`` ~ N(0, 1) of the shape of ``loc``."""
        return self.loc + self.scale * noise
