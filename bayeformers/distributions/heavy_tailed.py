"""Priors with heavier tails and a sharper peak than a Gaussian: most weights near the centre, a few far from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .diagonal_normal import MIN_SCALE, DiagonalNormal
from .initial_scale import InitialScale
from .prior import Prior, centre_tensor, check_centre, check_positive, is_number, scalar_like


@dataclass(frozen=True)
class ScaleMixturePrior(Prior):
    """pi N(0, std1^2) + (1 - pi) N(0, std2^2), Blundell et al. 2015 (arXiv 1505.05424), section 3.3.

    Args:
        pi: weight of the first component, in (0, 1).
        std1: its standard deviation > 0.
        std2: the other's.
        quadrature: None for the unbiased one-draw KL, or the number of Gauss-Hermite nodes per weight.
    """

    pi: float = 0.5
    std1: float = 1.0
    std2: float = 0.0025
    quadrature: int | None = None
    type: ClassVar[str] = "scale_mixture"

    def __post_init__(self) -> None:
        if not (is_number(self.pi) and 0 < self.pi < 1):
            raise ValueError(f"`pi` must lie in (0, 1), got {self.pi!r}; it is the weight of the first component.")
        check_positive("std1", self.std1)
        check_positive("std2", self.std2)
        if self.quadrature is not None and not (type(self.quadrature) is int and self.quadrature >= 1):
            raise ValueError(f"`quadrature` must be None or a whole number >= 1, got {self.quadrature!r}.")

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> ScaleMixture:
        """The same mixture for every tensor."""
        return ScaleMixture(self.pi, self.std1, self.std2, self.quadrature)


@dataclass(frozen=True)
class DoubleExponentialPrior(Prior):
    """exp(-|w - m| / b) / (2 b), the double-exponential (Laplace) density; the Bayesian lasso's.

    Named in full, as a Laplace posterior is another thing here. ``scale`` is absolute, so what :class:`NormalPrior`
    warns of holds: with far more weights than data, sigma drifts to its optimum under the prior, b sqrt(pi / 2).
    Park and Casella 2008.

    Args:
        scale: b > 0, the mean of |w - m|; the standard deviation is b sqrt(2).
        centre: m: "pretrained" (the trained weight) or a finite number.
    """

    scale: float = 1.0
    centre: float | Literal["pretrained"] = "pretrained"
    type: ClassVar[str] = "double_exponential"

    def __post_init__(self) -> None:
        check_positive("scale", self.scale, "the mean of |w - centre|")
        check_centre(self.centre)

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DoubleExponential:
        """The density around m."""
        return DoubleExponential(centre_tensor(self.centre, centre), scalar_like(centre, self.scale))


@dataclass(frozen=True)
class LogUniformPrior(Prior):
    """p(w) proportional to 1 / |w|: log|w| uniform, an improper density that knows no scale.

    The implicit prior of variational dropout (Kingma et al. 2015, arXiv 1506.02557; Molchanov et al. 2017, arXiv
    1701.05369). Its KL is known up to a constant, which is set so that the KL is 0 where sigma / |mu| -> infinity
    (Molchanov et al., equation 14): then it is >= 0, and grows as log(|mu| / sigma) for weights that are all signal.
    """

    type: ClassVar[str] = "log_uniform"

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> LogUniform:
        """The same density for every tensor."""
        return LogUniform()


@dataclass(frozen=True)
class ScaleMixture:
    """Density of :class:`ScaleMixturePrior`, the same for every weight."""

    pi: float
    std1: float
    std2: float
    quadrature: int | None = None
    separable: ClassVar[bool] = True

    def log_prob(self, value: Tensor) -> Tensor:
        """log(pi N(value; 0, std1^2) + (1 - pi) N(value; 0, std2^2)), elementwise."""
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        first = DiagonalNormal(zero, scalar_like(value, self.std1)).log_prob(value) + math.log(self.pi)
        second = DiagonalNormal(zero, scalar_like(value, self.std2)).log_prob(value) + math.log1p(-self.pi)
        return torch.logaddexp(first, second)


@dataclass(frozen=True)
class DoubleExponential:
    """Density of :class:`DoubleExponentialPrior`: centre ``loc``, mean deviation ``scale``."""

    loc: Tensor
    scale: Tensor
    separable: ClassVar[bool] = True

    def log_prob(self, value: Tensor) -> Tensor:
        """-|w - m| / b - log(2 b), elementwise."""
        return -(value - self.loc).abs() / self.scale - (2 * self.scale).log()


@dataclass(frozen=True)
class LogUniform:
    """Density of :class:`LogUniformPrior`, improper: its constant makes the KL of a posterior centred at 0 zero."""

    separable: ClassVar[bool] = True
    LOG_CONSTANT: ClassVar[float] = -0.5 * (1 + math.log(math.pi) + 2 * math.log(2) + 0.5772156649015329)
    """-log(2 pi e) / 2 + E log|z|, z ~ N(0, 1), where E log|z| = -(log 2 + Euler's constant) / 2."""

    def log_prob(self, value: Tensor) -> Tensor:
        """-log|w| + :attr:`LOG_CONSTANT`, elementwise."""
        return self.LOG_CONSTANT - value.abs().clamp_min(MIN_SCALE).log()
