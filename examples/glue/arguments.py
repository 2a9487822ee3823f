"""The command line of ``python -m examples.bert_glue``: flags, a ``--config`` file, defaults per task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bayeformers.distributions import Prior, prior_from_dict
from bayeformers.tasks import GLUE_TASKS
from examples.commands import example_parser, look_ahead, parse, user_input
from examples.training_flags import BestEpochArguments

EMBEDDED: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 20, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
    "warmup_steps": 0.1, "patience": 5, "bayesian_epochs": 15, "bayesian_learning_rate": 1e-3,
    "freeze": False, "delta": 0.4, "prior": '{"type": "normal", "std": 0.1, "centre": 0.0}', "kl_weight": 0.003,
    "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of the embedded task: a small model that has never seen a word, and over-fits.

Its means train on, under weight noise, with the standard deviation that the weights were initialised with as the
prior's. Chosen by the validation NLL of three seeds: docs/results.md.
"""

PRETRAINED: dict[str, Any] = {
    "num_train_epochs": 4, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 2,
}  # fmt: skip
"""Defaults of a GLUE task: fine-tuning of a pretrained model."""

EMBEDDED_KIND, GLUE_KIND = "embedded task", "GLUE tasks"
"""What --help calls them."""

PRIOR_CHOICES = ("marglik", "marglik_per_layer", "holdout")


@dataclass
class ModelArguments:
    """Which model, and how it becomes Bayesian."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model: a folder or a hub name. Left out, the embedded task makes a tiny BERT."},
    )
    method: Literal["variational", "linearized", "laplace", "all"] = field(
        default="variational",
        metadata={
            "help": "How the posterior is found: the ELBO; noise of one held-out delta around the deterministic model, "
            "linearised, without another training (docs/results.md recommends it for pretrained models); the curvature "
            "around that model; or all, with Laplace once for all layers and once for the last."
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Initial posterior scale relative to |weight|; if not given, that of least validation NLL, as "
            "always of --method linearized without the flag, and within --method all."
        },
    )
    freeze: bool = field(default=True, metadata={"help": "Train the scales only; --no_freeze trains the means too."})
    prior: str = field(
        default="moped",
        metadata={"help": 'moped, normal, scale_mixture, empirical_bayes, or JSON: {"type": "normal", "std": 0.1}.'},
    )
    estimator: str = field(default="reparameterization", metadata={"help": "How weight noise enters in training."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Name suffixes of the layers to make Bayesian; all if not given."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Name suffixes of layers that stay deterministic."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Name suffixes of modules that stay deterministic but are trained."}
    )
    keep_dropout: bool = field(default=False, metadata={"help": "Leave dropout on in the Bayesian model."})
    laplace_subset: Literal["all", "last_layer"] = field(
        default="all", metadata={"help": "Layers of --method laplace; --method all fits both."}
    )
    laplace_curvature: Literal["auto", "kfac", "ekfac", "diagonal"] = field(
        default="auto", metadata={"help": "Form of each layer's curvature; auto: kfac, of a small last layer dense."}
    )
    laplace_fisher: Literal["auto", "exact", "mc", "empirical"] = field(
        default="auto", metadata={"help": "Which curvature; auto: exact up to 16 backward passes per batch, else mc."}
    )
    prior_precision: str = field(
        default="holdout",
        metadata={
            "help": "tau of the Laplace posterior's prior N(0, 1/tau): holdout (validation NLL), marglik, "
            "marglik_per_layer (the evidence), or a number."
        },
    )

    def __post_init__(self) -> None:
        parse_prior_precision(self.prior_precision)

    @property
    def conversion(self) -> dict[str, Any]:
        """The arguments of `to_bayesian` besides ``delta``."""
        return {
            "freeze": self.freeze,
            "prior": parse_prior(self.prior),
            "estimator": self.estimator,
            "target_modules": self.target_modules or "all",
            "exclude_modules": self.exclude_modules,
            "modules_to_save": self.modules_to_save,
            "keep_dropout": self.keep_dropout,
        }

    @property
    def laplace(self) -> dict[str, Any]:
        """The arguments of `BayesianTrainer.fit_laplace` besides ``subset`` and the data."""
        return {
            "curvature": self.laplace_curvature,
            "fisher": self.laplace_fisher,
            "prior_precision": parse_prior_precision(self.prior_precision),
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
        }


@dataclass
class DataArguments:
    """Which task, and from where."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}. Left out: the embedded acceptability task."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the task's official TSV files, such as glue/CoLA; else the hub's nyu-mll/glue."},
    )
    ood_data_file: str | None = field(
        default=None,
        metadata={
            "help": "TSV file of shifted inputs: the task's layout, or a header with its columns; labels optional."
        },
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "TSV file of labelled rows that choose epochs, temperature, delta and prior precision, laid out as "
            "--ood_data_file; then nothing is held out of train."
        },
    )
    validation_share: float = field(
        default=0.1, metadata={"help": "Share of train held out for early stopping and the temperature (GLUE tasks)."}
    )
    split_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the held-out rows, of the embedded task's sentences too; if not given, that of the record "
            "of the model (--eval_only, --model_name_or_path), else --seed."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each other set."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})

    def __post_init__(self) -> None:
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in GLUE_TASKS:
                raise ValueError(f"`task_name` must be one of {', '.join(GLUE_TASKS)}, got {self.task_name!r}.")
        elif self.data_dir is not None:
            raise ValueError(f"`data_dir` {self.data_dir!r} needs a `task_name`: {', '.join(GLUE_TASKS)}.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"`validation_share` must lie between 0 and 1, got {self.validation_share}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"`{name}` must be at least 2, got {value}.")


@dataclass
class TwoTrainingsArguments(BestEpochArguments):
    """Every TrainingArguments flag, for a deterministic training and the ELBO's, and what differs between them."""

    patience: int = field(
        default=4, metadata={"help": "Stop a training after so many epochs without a better validation NLL."}
    )
    bayesian_epochs: float = field(default=10.0, metadata={"help": "Epochs of the ELBO's training."})
    bayesian_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of trainable means in it; a tenth of --learning_rate if not given."},
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1:
            raise ValueError(f"`patience` must be at least 1 epoch, got {self.patience}.")
        if self.bayesian_epochs < 0:
            raise ValueError(f"`bayesian_epochs` must not be negative, got {self.bayesian_epochs}.")


@dataclass
class ExampleTrainingArguments(TwoTrainingsArguments):
    """Those of this example."""

    output_dir: str | None = field(
        default="outputs/bert_glue", metadata={"help": "Where models, results.json, predictions.csv and the PNG go."}
    )
    eval_only: str | None = field(
        default=None, metadata={"help": "Train nothing: evaluate the models in this folder, an earlier --output_dir."}
    )


Arguments = tuple[ModelArguments, DataArguments, ExampleTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from ``--config``, then from the task's defaults.

    Raises:
        FileNotFoundError, ValueError: the configuration file is missing, not a JSON object, or has an unknown key.
        SystemExit: an unknown flag, or a value of the wrong type.
    """
    groups = (ModelArguments, DataArguments, ExampleTrainingArguments)
    model, data, training = parse_groups(groups, argv, EMBEDDED)
    if training.eval_only is None:
        with user_input():
            check_model_is_named(model, data)
    return model, data, training


def parse_groups(groups: Sequence[type], argv: Sequence[str] | None, embedded: Mapping[str, Any]) -> tuple[Any, ...]:
    """One object of each of the dataclasses ``groups``; ``embedded`` are the defaults of the embedded task."""
    known = look_ahead(argv, "config", "task_name", "method")
    with user_input():
        config = read_config(known.config) if known.config else {}
    kinds = {EMBEDDED_KIND: embedded, GLUE_KIND: PRETRAINED}
    task, method = (getattr(known, name) or config.get(name) for name in ("task_name", "method"))
    parser = example_parser(groups, kinds, GLUE_KIND if task else EMBEDDED_KIND)
    parser.add_argument("--config", help="JSON file of arguments; the command line wins over it.")
    flags = {action.dest for action in parser._actions}
    if unknown := sorted(set(config) - flags):
        with user_input():
            raise ValueError(f"{known.config} has unknown keys: {', '.join(unknown)}. Flags are listed by --help.")
    calibrated = {"delta": None} if method == "linearized" else {}  # the embedded task's delta is the ELBO's
    parser.set_defaults(**{**calibrated, **config})
    return parse(parser, argv)


def check_model_is_named(model: ModelArguments, data: DataArguments) -> None:
    """Raise ValueError for a GLUE task without a model."""
    if data.task_name is not None and model.model_name_or_path is None:
        raise ValueError(
            f"`model_name_or_path` is needed for the task {data.task_name}: a folder or a hub name, such as "
            "bert-base-uncased. Only the embedded task makes its own model."
        )


def read_config(path: str) -> dict[str, Any]:
    """A JSON object of arguments."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`config` {path} does not exist.")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object of arguments, got a {type(config).__name__}.")
    return config


def parse_prior(text: str) -> Prior:
    """A prior by its name, with default settings, or by the JSON that describes it.

    >>> parse_prior("moped")
    MopedPrior(relative_scale=1.0)
    """
    if not text.lstrip().startswith("{"):
        return prior_from_dict({"type": text})
    try:
        return prior_from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"`prior` {text!r} is not JSON: {error}.") from None


def parse_prior_precision(text: str) -> str | float:
    """How to find tau, by name, or tau itself.

    >>> parse_prior_precision("holdout"), parse_prior_precision("30")
    ('holdout', 30.0)
    """
    if text in PRIOR_CHOICES:
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"`prior_precision` must be one of {PRIOR_CHOICES} or a finite number > 0, got {text!r}.")
    return value
