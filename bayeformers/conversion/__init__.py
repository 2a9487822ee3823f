"""From a trained model to a Bayesian one and back: which layers, with which prior, and the record of it."""

from .config import BayesianConfig
from .continual import posterior_as_prior
from .convert import is_bayesian, to_bayesian, to_deterministic, unfreeze
from .pruning import prune, signal_to_noise
from .record import Conversion, bayesian_config, conversion_record, update_config
from .registry import register_layer

__all__ = [
    "BayesianConfig",
    "Conversion",
    "bayesian_config",
    "conversion_record",
    "is_bayesian",
    "posterior_as_prior",
    "prune",
    "register_layer",
    "signal_to_noise",
    "to_bayesian",
    "to_deterministic",
    "unfreeze",
    "update_config",
]
