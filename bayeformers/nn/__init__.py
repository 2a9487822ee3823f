"""Bayesian layers: each is its torch (or transformers) layer with a Gaussian over every weight."""

from .base import BayesianModule, NamedVariational, variational_tensors
from .draws import fixed_draw, one_draw_per_forward, posterior_mean, training_draw
from .embedding import Embedding
from .estimators import ESTIMATORS, Estimator, Reparameterization
from .linear import Conv1D, Linear
from .variational import Variational

__all__ = [
    "ESTIMATORS",
    "BayesianModule",
    "Conv1D",
    "Embedding",
    "Estimator",
    "Linear",
    "NamedVariational",
    "Reparameterization",
    "Variational",
    "fixed_draw",
    "one_draw_per_forward",
    "posterior_mean",
    "training_draw",
    "variational_tensors",
]
