"""KFAC Laplace: a Gaussian posterior for any trained network, from the curvature of its likelihood."""

from ..linearized import register_curvature, register_rule
from .analysis.directions import EigenDirection, FactorSpectrum, draw_along, eigen_direction, factor_spectrum
from .analysis.gradients import ExampleGradients, example_gradients
from .analysis.influence import influence, inner_products, natural_gradient, novelty, similarity
from .config import CurvatureConfig, LaplaceConfig, LaplaceOptions
from .curvature import Curvature
from .fit import fit
from .from_sums import posterior_of
from .kronecker import KroneckerEigen
from .perturbed import TokenMask
from .posterior import LaplacePosterior, PrecisionChoice
from .sparse.inf_posterior import InfPosterior, inf_posterior
from .tuning import tune

__all__ = [
    "Curvature",
    "CurvatureConfig",
    "EigenDirection",
    "ExampleGradients",
    "FactorSpectrum",
    "InfPosterior",
    "KroneckerEigen",
    "LaplaceConfig",
    "LaplaceOptions",
    "LaplacePosterior",
    "PrecisionChoice",
    "TokenMask",
    "draw_along",
    "eigen_direction",
    "example_gradients",
    "factor_spectrum",
    "fit",
    "inf_posterior",
    "influence",
    "inner_products",
    "natural_gradient",
    "novelty",
    "posterior_of",
    "register_curvature",
    "register_rule",
    "similarity",
    "tune",
]
