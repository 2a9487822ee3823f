"""The variational family, the priors, and the divergence between them."""

from .diagonal_normal import MIN_SCALE, DiagonalNormal, rho_from_scale, scale_from_rho
from .kl import kl_divergence, register_kl
from .priors import (
    EmpiricalBayesPrior,
    EmpiricalNormal,
    InitialScale,
    MopedPrior,
    NormalPrior,
    Prior,
    PriorDistribution,
    ScaleMixture,
    ScaleMixturePrior,
    initial_scale,
    prior_from_dict,
)

__all__ = [
    "MIN_SCALE",
    "DiagonalNormal",
    "EmpiricalBayesPrior",
    "EmpiricalNormal",
    "InitialScale",
    "MopedPrior",
    "NormalPrior",
    "Prior",
    "PriorDistribution",
    "ScaleMixture",
    "ScaleMixturePrior",
    "initial_scale",
    "kl_divergence",
    "prior_from_dict",
    "register_kl",
    "rho_from_scale",
    "scale_from_rho",
]
