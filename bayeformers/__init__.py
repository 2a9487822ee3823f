"""bayeformers: any transformers model says how sure it is."""

from . import adapters, guarantees, heads, laplace, losses, models, ood
from .acquisition import acquire
from .checkpoint.export import export_draws
from .checkpoint.load import from_pretrained
from .checkpoint.mean import export_mean
from .checkpoint.network import network_of
from .conversion.config import BayesianConfig
from .conversion.continual import posterior_as_prior
from .conversion.convert import is_bayesian, to_bayesian, to_deterministic, unfreeze
from .conversion.pruning import prune, signal_to_noise
from .conversion.record import bayesian_config
from .conversion.registry import register_layer
from .conversion.summary import summary
from .delta import calibrate_delta
from .distributions import (
    ARDPrior,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    LogUniformPrior,
    MopedPrior,
    NormalPrior,
    PosteriorPrior,
    RelativePrior,
    ScaleMixturePrior,
)
from .generation import Generation, generate
from .guarantees import (
    AbstentionPolicy,
    PredictionIntervals,
    PredictionSets,
    fit_abstention,
    fit_prediction_intervals,
    fit_prediction_sets,
)
from .laplace import LaplacePosterior
from .moved import keep_old_paths, old_module
from .nn import fixed_draw, posterior_mean
from .nn.kl import kl_divergence, log_prior, log_variational_posterior
from .pipelines import pipeline
from .posteriors import Posterior, VariationalPosterior, predict
from .predictive import Predictive
from .training import BayesianArguments, BayesianTrainer, BayesianTrainerMixin, BayesianTrainingArguments

__version__ = "0.1.0"

keep_old_paths()
__getattr__ = old_module  # an old module as an attribute: `bayeformers.calibration`

__all__ = [
    "ARDPrior",
    "AbstentionPolicy",
    "BayesianArguments",
    "BayesianConfig",
    "BayesianTrainer",
    "BayesianTrainerMixin",
    "BayesianTrainingArguments",
    "DoubleExponentialPrior",
    "EmpiricalBayesPrior",
    "Generation",
    "LaplacePosterior",
    "LogUniformPrior",
    "MopedPrior",
    "NormalPrior",
    "Posterior",
    "PosteriorPrior",
    "PredictionIntervals",
    "PredictionSets",
    "Predictive",
    "RelativePrior",
    "ScaleMixturePrior",
    "VariationalPosterior",
    "acquire",
    "adapters",
    "bayesian_config",
    "calibrate_delta",
    "export_draws",
    "export_mean",
    "fit_abstention",
    "fit_prediction_intervals",
    "fit_prediction_sets",
    "fixed_draw",
    "from_pretrained",
    "generate",
    "guarantees",
    "heads",
    "is_bayesian",
    "kl_divergence",
    "laplace",
    "log_prior",
    "log_variational_posterior",
    "losses",
    "models",
    "network_of",
    "ood",
    "pipeline",
    "posterior_as_prior",
    "posterior_mean",
    "predict",
    "prune",
    "register_layer",
    "signal_to_noise",
    "summary",
    "to_bayesian",
    "to_deterministic",
    "unfreeze",
]
