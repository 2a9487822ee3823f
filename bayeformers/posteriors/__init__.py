"""Posteriors: what can put one draw of the weights into a model. Prediction is written once, for all of them."""

from .base import BasePosterior, Posterior
from .dropout import DropoutPosterior
from .files import register_posterior
from .mixture import MixturePosterior
from .point import PointPosterior
from .predict import predict
from .temperature import TemperaturePosterior
from .variational import VariationalPosterior
from .weights import WeightsPosterior

__all__ = [
    "BasePosterior",
    "DropoutPosterior",
    "MixturePosterior",
    "PointPosterior",
    "Posterior",
    "TemperaturePosterior",
    "VariationalPosterior",
    "WeightsPosterior",
    "predict",
    "register_posterior",
]
