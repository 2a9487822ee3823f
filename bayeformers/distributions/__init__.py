"""The variational family, the priors, and the divergence between them."""

from .diagonal_normal import MIN_SCALE, DiagonalNormal, rho_from_scale, scale_from_rho, unit_of
from .gaussian_priors import (
    ARDNormal,
    ARDPrior,
    EmpiricalBayesPrior,
    EmpiricalNormal,
    MopedPrior,
    NormalPrior,
    PosteriorPrior,
    RelativePrior,
)
from .heavy_tailed import (
    DoubleExponential,
    DoubleExponentialPrior,
    LogUniform,
    LogUniformPrior,
    ScaleMixture,
    ScaleMixturePrior,
)
from .initial_scale import InitialScale, initial_scale
from .kl import kl_divergence, register_kl
from .prior import Prior, PriorDistribution, prior_from_dict

__all__ = [
    "MIN_SCALE",
    "ARDNormal",
    "ARDPrior",
    "DiagonalNormal",
    "DoubleExponential",
    "DoubleExponentialPrior",
    "EmpiricalBayesPrior",
    "EmpiricalNormal",
    "InitialScale",
    "LogUniform",
    "LogUniformPrior",
    "MopedPrior",
    "NormalPrior",
    "PosteriorPrior",
    "Prior",
    "PriorDistribution",
    "RelativePrior",
    "ScaleMixture",
    "ScaleMixturePrior",
    "initial_scale",
    "kl_divergence",
    "prior_from_dict",
    "register_kl",
    "rho_from_scale",
    "scale_from_rho",
    "unit_of",
]
