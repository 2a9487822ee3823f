"""Posteriors: what can put one draw of the weights into a model. Prediction is written once, for all of them."""

from .base import BasePosterior, Posterior
from .files import register_posterior
from .point import PointPosterior
from .predict import predict
from .variational import VariationalPosterior
from .weights import WeightsPosterior

__all__ = [
    "BasePosterior",
    "PointPosterior",
    "Posterior",
    "VariationalPosterior",
    "WeightsPosterior",
    "predict",
    "register_posterior",
]
