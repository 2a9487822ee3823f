"""Training by variational inference, and Monte-Carlo evaluation, with transformers' Trainer."""

from .arguments import BayesianArguments, BayesianTrainingArguments
from .ensembles import AnchorCallback, perturbed_targets, train_ensemble
from .evaluator import BayesianPredictionOutput
from .items import ItemNLL, count_items, item_nll
from .mixin import BayesianTrainerMixin
from .monitor import PosteriorMonitor
from .snapshots import CyclicalCallback
from .swag import SWAGCallback
from .trainer import BayesianTrainer

__all__ = [
    "AnchorCallback",
    "BayesianArguments",
    "BayesianPredictionOutput",
    "BayesianTrainer",
    "BayesianTrainerMixin",
    "BayesianTrainingArguments",
    "CyclicalCallback",
    "ItemNLL",
    "PosteriorMonitor",
    "SWAGCallback",
    "count_items",
    "item_nll",
    "perturbed_targets",
    "train_ensemble",
]
