"""Posteriors: what can put one draw of the weights into a model. Prediction is written once, for all of them."""

from .base import BasePosterior, Posterior
from .diagonal import DiagonalPosterior
from .files import register_posterior
from .ivon import IVONPosterior
from .point import PointPosterior
from .predict import predict
from .variational import VariationalPosterior
from .weights import WeightsPosterior

__all__ = [
    "BasePosterior",
    "DiagonalPosterior",
    "IVONPosterior",
    "PointPosterior",
    "Posterior",
    "VariationalPosterior",
    "WeightsPosterior",
    "predict",
    "register_posterior",
]
