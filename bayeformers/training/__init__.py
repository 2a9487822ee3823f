"""Training by variational inference, and Monte-Carlo evaluation, with transformers' Trainer."""

from .arguments import BayesianTrainingArguments
from .evaluator import BayesianPredictionOutput
from .items import ItemNLL, count_items, item_nll
from .trainer import BayesianTrainer

__all__ = [
    "BayesianPredictionOutput",
    "BayesianTrainer",
    "BayesianTrainingArguments",
    "ItemNLL",
    "count_items",
    "item_nll",
]
