"""Posteriors: what can put one draw of the weights into a model. Prediction is written once, for all of them."""

from .base import BasePosterior, Posterior
from .diagonal import DiagonalPosterior
from .dropout import DropoutPosterior
from .ensemble import EnsemblePosterior
from .files import register_posterior
from .ivon import IVONPosterior
from .mixture import MixturePosterior
from .moments import Moments, RunningMoments
from .point import PointPosterior
from .predict import predict
from .swag import SWAGPosterior
from .temperature import TemperaturePosterior
from .variational import VariationalPosterior
from .weights import WeightsPosterior

__all__ = [
    "BasePosterior",
    "DiagonalPosterior",
    "DropoutPosterior",
    "EnsemblePosterior",
    "IVONPosterior",
    "MixturePosterior",
    "Moments",
    "PointPosterior",
    "Posterior",
    "RunningMoments",
    "SWAGPosterior",
    "TemperaturePosterior",
    "VariationalPosterior",
    "WeightsPosterior",
    "predict",
    "register_posterior",
]
