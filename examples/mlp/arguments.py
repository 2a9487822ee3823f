"""The command line of ``python -m examples.mlp_mnist``: its flags, and defaults by the images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bayeformers import BayesianConfig
from examples.commands import example_parser, look_ahead, parse
from examples.glue.arguments import parse_prior
from examples.images.arguments import DataArguments
from examples.images.classifier_arguments import DIGITS_KIND, FILES_KIND, ClassifierTrainingArguments

DIGITS: dict[str, Any] = {
    "num_train_epochs": 30, "per_device_train_batch_size": 32, "bayesian_epochs": 40, "moped_epochs": 5,
    "bayesian_learning_rate": 3e-3, "kl_weight": 0.01, "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of scikit-learn's digits: a fifth of the images, and easier ones."""

FILES: dict[str, Any] = {
    "num_train_epochs": 20, "per_device_train_batch_size": 128, "bayesian_epochs": 40, "moped_epochs": 10,
    "bayesian_learning_rate": 3e-3, "kl_weight": 0.1, "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of other images, chosen on 1,000 held-out images of MNIST's t10k files; the other 7,000 trained.

Held-out accuracy after 40 epochs: 95.2 % with these, 90.5 % with the ELBO itself (--kl_weight 1), 94.5 % without noise.
"""


@dataclass
class MlpArguments:
    """The network, how it becomes Bayesian, and how much of it is removed."""

    hidden_sizes: list[int] = field(default_factory=lambda: [400, 400], metadata={"help": "Widths of hidden layers."})
    prior: str = field(
        default='{"type": "normal", "std": 0.1, "centre": 0.0}',
        metadata={
            "help": 'Prior of the training from scratch: scale_mixture, normal, ... or JSON: {"type": "scale_mixture", '
            '"pi": 0.25, "std1": 1.0, "std2": 0.0025}.'
        },
    )
    moped_prior: str = field(
        default="moped", metadata={"help": "MOPED's prior; its own is around the trained weights."}
    )
    initial_scale: float = field(default=0.02, metadata={"help": "Every sigma at the start of that training."})
    delta: float | None = field(
        default=None,
        metadata={"help": "MOPED's initial sigma relative to |weight|; if not given, that of least validation NLL."},
    )
    estimator: Literal["reparameterization", "flipout", "local_reparameterization"] = field(
        default="local_reparameterization", metadata={"help": "How weight noise enters in training."}
    )
    removed: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98],
        metadata={"help": "Shares of the weights to remove, each in [0, 1)."},
    )

    def __post_init__(self) -> None:
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"`hidden_sizes` must be one or more widths >= 1, got {self.hidden_sizes}.")
        if not 0 < self.initial_scale < math.inf:
            raise ValueError(f"`initial_scale` must be a finite number > 0, got {self.initial_scale}.")
        if not self.removed or not all(0 <= share < 1 for share in self.removed):
            raise ValueError(f"`removed` must be shares in [0, 1), got {self.removed}.")
        self.removed = sorted({0.0, *self.removed})
        for prior in (self.prior, self.moped_prior):
            BayesianConfig(delta=0.05 if self.delta is None else self.delta, prior=parse_prior(prior))


@dataclass
class MlpTrainingArguments(ClassifierTrainingArguments):
    """Every TrainingArguments flag, for each training, and what differs between them."""

    output_dir: str | None = field(
        default="outputs/mlp_mnist", metadata={"help": "Where models, results.json and the two PNG go."}
    )
    bayesian_epochs: float = field(default=60.0, metadata={"help": "Epochs of the training from scratch."})
    bayesian_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of its means; --learning_rate if not given."}
    )
    moped_epochs: float = field(default=10.0, metadata={"help": "Epochs of the training from the trained weights."})
    moped_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of its means; 0.3 times --learning_rate if not given."}
    )
    moped_kl_weight: float = field(default=1.0, metadata={"help": "--kl_weight of that training."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moped_epochs < 1:
            raise ValueError(f"`moped_epochs` must be at least 1, got {self.moped_epochs}.")
        if not 0 <= self.moped_kl_weight < math.inf:
            raise ValueError(f"`moped_kl_weight` must be a finite number >= 0, got {self.moped_kl_weight}.")


Arguments = tuple[MlpArguments, DataArguments, MlpTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from the images' defaults.

    Raises:
        ValueError: a value out of its range.
        SystemExit: an unknown flag, or a value of the wrong type.
    """
    known = look_ahead(argv, "data_dir", "dataset_name")
    kinds = {DIGITS_KIND: DIGITS, FILES_KIND: FILES}
    chosen = FILES_KIND if known.data_dir or known.dataset_name else DIGITS_KIND
    mlp, data, training = parse(
        example_parser((MlpArguments, DataArguments, MlpTrainingArguments), kinds, chosen), argv
    )
    return mlp, data, training
