"""Posteriors: what can put one draw of the weights into a model. Prediction is written once, for all of them."""

from .base import BasePosterior, Posterior
from .ensemble import EnsemblePosterior
from .files import register_posterior
from .moments import Moments, RunningMoments
from .point import PointPosterior
from .predict import predict
from .swag import SWAGPosterior
from .variational import VariationalPosterior
from .weights import WeightsPosterior

__all__ = [
    "BasePosterior",
    "EnsemblePosterior",
    "Moments",
    "PointPosterior",
    "Posterior",
    "RunningMoments",
    "SWAGPosterior",
    "VariationalPosterior",
    "WeightsPosterior",
    "predict",
    "register_posterior",
]
