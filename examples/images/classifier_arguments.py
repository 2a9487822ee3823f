"""The command line of ``python -m examples.image_classification``: its flags, and defaults by model and images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bayeformers import BayesianConfig
from examples.commands import example_parser, look_ahead, parse, show_defaults
from examples.glue.arguments import parse_prior, parse_prior_precision
from examples.images.arguments import DataArguments
from examples.images.models import MODELS
from examples.training_flags import BestEpochArguments

DIGITS: dict[str, Any] = {
    "num_train_epochs": 40, "per_device_train_batch_size": 32, "bayesian_epochs": 10, "validation_share": 0.5,
}  # fmt: skip
"""Defaults of scikit-learn's digits: few images, hence more epochs; easy ones, hence many held out to choose by."""

FILES: dict[str, Any] = {
    "num_train_epochs": 15, "per_device_train_batch_size": 64, "bayesian_epochs": 4,
}  # fmt: skip
"""Defaults of other images."""

DIGITS_KIND, FILES_KIND = "scikit-learn's digits", "other images"
"""What --help calls them."""


@dataclass
class ClassifierArguments:
    """Which model, which question, and how the model becomes Bayesian."""

    model: str = field(default="lenet5", metadata={"help": f"One of {', '.join(MODELS)}."})
    task: Literal["acc", "init", "uncert"] = field(
        default="acc",
        metadata={
            "help": "acc: the methods' scores and sizes; init: a pretrained net converted, then trained with its means "
            "frozen or not; uncert: uncertainty and error of rotated images."
        },
    )
    width: float = field(default=1.0, metadata={"help": "Factor of every layer's width."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A trained deterministic image classifier, a folder or a hub name, in place of --model."},
    )
    method: Literal["variational", "laplace", "all"] = field(
        default="all", metadata={"help": "Posteriors of acc and uncert: the ELBO's, Laplace, or both."}
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Initial posterior scale relative to |weight|; if not given, that of least validation NLL."},
    )
    freeze: bool = field(default=False, metadata={"help": "Train the scales only, in acc and uncert; init does both."})
    prior: str = field(
        default="moped",
        metadata={"help": 'moped, normal, scale_mixture, empirical_bayes, or JSON: {"type": "normal", "std": 0.1}.'},
    )
    estimator: Literal["reparameterization", "flipout", "local_reparameterization"] = field(
        default="flipout", metadata={"help": "How weight noise enters in training."}
    )
    laplace_subset: Literal["all", "last_layer"] = field(
        default="all", metadata={"help": "Layers of the Laplace posterior."}
    )
    laplace_curvature: Literal["auto", "kfac", "ekfac", "diagonal"] = field(
        default="auto", metadata={"help": "Form of each layer's curvature; auto: kfac, of a small last layer dense."}
    )
    prior_precision: str = field(
        default="holdout",
        metadata={
            "help": "tau of the Laplace posterior's prior N(0, 1/tau): holdout (validation NLL), marglik, "
            "marglik_per_layer (the evidence), or a number."
        },
    )
    angle_step: float = field(default=15.0, metadata={"help": "Degrees between the angles of uncert, from 0 to 180."})
    strip_image: int = field(default=0, metadata={"help": "Position of the test image that uncert shows turned."})

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"`model` must be one of {', '.join(MODELS)}, got {self.model!r}.")
        if not 0 < self.width < math.inf:
            raise ValueError(f"`width` must be a finite number > 0, got {self.width}.")
        BayesianConfig(delta=0.05 if self.delta is None else self.delta, **self.conversion)  # refuses what is wrong
        parse_prior_precision(self.prior_precision)
        if not 0 < self.angle_step <= 180:
            raise ValueError(f"`angle_step` must lie in (0, 180] degrees, got {self.angle_step}.")
        if self.strip_image < 0:
            raise ValueError(f"`strip_image` must be a position from 0, got {self.strip_image}.")

    @property
    def conversion(self) -> dict[str, Any]:
        """The arguments of `to_bayesian` besides ``delta`` and ``freeze``."""
        return {"prior": parse_prior(self.prior), "estimator": self.estimator}

    @property
    def laplace(self) -> dict[str, Any]:
        """The arguments of `BayesianTrainer.fit_laplace` besides the data."""
        return {
            "subset": self.laplace_subset,
            "curvature": self.laplace_curvature,
            "prior_precision": parse_prior_precision(self.prior_precision),
        }


@dataclass
class ClassifierTrainingArguments(BestEpochArguments):
    """Every TrainingArguments flag, for both trainings, and what differs between them."""

    output_dir: str | None = field(
        default="outputs/image_classification",
        metadata={"help": "Where the models go, and the numbers and the picture, as TASK.json and TASK.png."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the deterministic training."})
    per_device_eval_batch_size: int = field(default=200, metadata={"help": "Images per evaluation batch."})
    patience: int = field(
        default=10, metadata={"help": "Stop the deterministic training after so many epochs without a better NLL."}
    )
    bayesian_epochs: float = field(default=4.0, metadata={"help": "Epochs of every further training, the ELBO's too."})
    bayesian_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of trainable means in them; 0.3 times --learning_rate if not given."},
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    save_only_model: bool = field(default=True, metadata={"help": "Keep no optimizer state of the epochs."})
    metric_for_best_model: str | None = field(default="eval_nll", metadata={"help": "What is best: this alone."})

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **BestEpochArguments.fixed,
        "metric_for_best_model": ("eval_nll", BestEpochArguments.fixed["metric_for_best_model"][1]),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1 epoch, got {self.patience}.")
        if self.bayesian_epochs < 1:
            raise ValueError(f"`bayesian_epochs` must be at least 1, got {self.bayesian_epochs}.")

    @property
    def further_learning_rate(self) -> float:
        """Of weights, or means, that are trained already."""
        return 0.3 * self.learning_rate if self.bayesian_learning_rate is None else self.bayesian_learning_rate


Arguments = tuple[ClassifierArguments, DataArguments, ClassifierTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from the model's defaults, then from the images'.

    Raises:
        ValueError: a value out of its range, or an unknown flag.
        SystemExit: a value of the wrong type, or none of a flag's choices.
    """
    known = look_ahead(argv, "data_dir", "dataset_name", "model")
    kinds = {DIGITS_KIND: DIGITS, FILES_KIND: FILES}
    chosen = FILES_KIND if known.data_dir or known.dataset_name else DIGITS_KIND
    parser = example_parser((ClassifierArguments, DataArguments, ClassifierTrainingArguments), kinds, chosen)
    show_defaults(parser, {f"--model {name}": {"learning_rate": of.learning_rate} for name, of in MODELS.items()})
    model = MODELS.get(known.model or "lenet5")
    if model is not None:
        parser.set_defaults(learning_rate=model.learning_rate)
    classifier, data, training = parse(parser, argv)
    return classifier, data, training
