"""The Trainer's flags in the examples: those that an example sets itself, or cannot do without, are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from bayeformers import BayesianTrainingArguments

_PREDICTS = "the results are made of the predictions of every row"
_CHOOSES = "the example trains epoch by epoch and keeps the one of least validation NLL"
_MAX_SEED = 2**32 - 1  # of NumPy's generator


@dataclass
class ExampleArguments(BayesianTrainingArguments):
    """Every TrainingArguments flag.

    Attributes:
        fixed: by flag, the only value under which the example works, and why.
    """

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "prediction_loss_only": (False, _PREDICTS),
        "eval_do_concat_batches": (True, _PREDICTS),
        "dataloader_drop_last": (False, _PREDICTS),
    }

    def __post_init__(self) -> None:
        for name, (value, why) in self.fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {value} in this example, got {getattr(self, name)}: {why}.")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"`seed` must lie between 0 and {_MAX_SEED}, got {self.seed}.")
        super().__post_init__()
        self.dataloader_pin_memory &= torch.cuda.is_available()  # elsewhere it only makes torch warn at every epoch


@dataclass
class BestEpochArguments(ExampleArguments):
    """Those of trainings that report on the validation set after each epoch, and keep the best one."""

    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: epoch alone."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: epoch alone."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints to keep beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best epoch: always."})
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "What is best: this alone."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "False, for the least is best."})

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **ExampleArguments.fixed,
        "eval_strategy": ("epoch", _CHOOSES),
        "save_strategy": ("epoch", _CHOOSES),
        "load_best_model_at_end": (True, _CHOOSES),
        "metric_for_best_model": ("eval_loss", _CHOOSES),
        "greater_is_better": (False, _CHOOSES),
    }


def check_smoothing(groups: Sequence[Any]) -> None:
    """Raise ValueError where an ELBO would be of a smoothed loss; ``groups`` are the dataclasses of a command line."""
    factor = max((group.label_smoothing_factor for group in groups if isinstance(group, ExampleArguments)), default=0)
    methods = [group.method for group in groups if hasattr(group, "method")]
    if factor != 0 and methods != ["laplace"]:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 in this example, got {factor}: a smoothed loss is no log-likelihood, "
            "and a Bayesian model's loss needs one."
        )
