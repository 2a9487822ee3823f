"""Groups of flags that experiments share; those of the Trainer that an experiment cannot honour are refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from ..distributions import Prior, prior_from_dict
from ..distributions.initial_scale import check_delta
from ..nn.estimators import get_estimator
from ..training import BayesianTrainingArguments

PRIOR_CHOICES = ("perturbed", "leverage", "marglik", "marglik_per_layer", "holdout")
_PREDICTS = "the results are made of the predictions of every row"
_CHOOSES = "the example trains epoch by epoch and keeps the one of least validation NLL"
_MAX_SEED = 2**32 - 1  # of NumPy's generator
T = TypeVar("T")


def flag(default: T, text: str) -> T:
    """A dataclass field that is a flag of the command line: its default, and what --help says."""
    metadata = {"help": text}
    if isinstance(default, list):
        made: Any = field(default_factory=lambda: list(default), metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return made  # type: ignore[no-any-return]


def parse_prior(text: str) -> Prior:
    """Return a prior by its name, with default settings, or by the JSON that describes it.

    Raises:
        ValueError: an unknown name, or malformed JSON.

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
    """Return how to find the Laplace prior's precision: a method's name, or tau itself.

    Raises:
        ValueError: neither a known name nor a finite number > 0.

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


def check_least(group: Any, **least: float) -> None:
    """Raise ValueError where a flag of the group is given and less than its least value."""
    for name, limit in least.items():
        if (value := getattr(group, name)) is not None and value < limit:
            raise ValueError(f"`{name}` must be at least {limit}, got {value}.")


class Checked:
    """A group of flags whose values are checked once all groups of a dataclass are filled."""

    def __post_init__(self) -> None:
        """Nothing of its own to check."""


@dataclass
class ConversionArguments(Checked):
    """How a trained model becomes Bayesian: the arguments of `to_bayesian`."""

    delta: float | None = flag(
        None, "Initial posterior scale relative to |weight|; if not given, that of least validation NLL."
    )
    freeze: bool = flag(True, "Train the scales only; --no_freeze trains the means too.")
    prior: str = flag(
        "moped", 'moped, normal, scale_mixture, empirical_bayes, or JSON: {"type": "normal", "std": 0.1}.'
    )
    estimator: str = flag("reparameterization", "How weight noise enters in training.")
    target_modules: list[str] | None = flag(None, "Name suffixes of the layers to make Bayesian; all if not given.")
    exclude_modules: list[str] | None = flag(None, "Name suffixes of layers that stay deterministic.")
    modules_to_save: list[str] | None = flag(None, "Name suffixes of modules that stay deterministic but are trained.")
    keep_dropout: bool = flag(False, "Leave dropout on in the Bayesian model.")

    def __post_init__(self) -> None:
        """Refuse what `to_bayesian` would, before a training that it would come after."""
        super().__post_init__()
        if self.delta is not None:
            check_delta(self.delta)
        parse_prior(self.prior)
        get_estimator(self.estimator)

    @property
    def conversion(self) -> dict[str, Any]:
        """The arguments of `to_bayesian` besides ``delta``."""
        names = ("freeze", "estimator", "exclude_modules", "modules_to_save", "keep_dropout")
        as_given = {name: getattr(self, name) for name in names}
        return {**as_given, "prior": parse_prior(self.prior), "target_modules": self.target_modules or "all"}


@dataclass
class LaplaceArguments(Checked):
    """How a Laplace posterior is fitted: the arguments of `BayesianTrainer.fit_laplace`."""

    laplace_subset: Literal["all", "last_layer"] = flag("all", "Layers of the Laplace posterior.")
    laplace_curvature: Literal["auto", "kfac", "ekfac", "diagonal"] = flag(
        "auto", "Form of each layer's curvature; auto: kfac, of a small last layer dense."
    )
    laplace_fisher: Literal["auto", "exact", "mc", "empirical"] = flag(
        "auto", "Which curvature; auto: exact up to 16 backward passes per batch, else mc."
    )
    prior_precision: str = flag(
        "holdout",
        "tau of the Laplace posterior's prior N(0, 1/tau): holdout (validation NLL), leverage (of training rows), "
        "marglik, marglik_per_layer (the evidence), or a number.",
    )

    def __post_init__(self) -> None:
        """Refuse a prior precision that is neither a method nor a positive number."""
        super().__post_init__()
        parse_prior_precision(self.prior_precision)

    @property
    def laplace(self) -> dict[str, Any]:
        """The arguments of `BayesianTrainer.fit_laplace` besides the data; a subclass may name layers too."""
        layers = {name: getattr(self, name) for name in ("target_modules", "exclude_modules") if hasattr(self, name)}
        how = {name: getattr(self, f"laplace_{name}") for name in ("subset", "curvature", "fisher")}
        return {**layers, **how, "prior_precision": parse_prior_precision(self.prior_precision)}


@dataclass
class ReportArguments(Checked):
    """Whether a page of the results is written."""

    report: str | None = flag(
        None, "Write the results as one self-contained page of HTML to this file too, such as outputs/report.html."
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be written, before a training that it would come after."""
        super().__post_init__()
        if self.report is not None and (not self.report or Path(self.report).is_dir()):
            raise ValueError(f"`report` must be a file to write, such as report.html, got {self.report!r}.")


@dataclass
class HoldOutArguments:
    """How many rows are held out of the training data, and which."""

    validation_share: float = flag(0.1, "Share of the training rows held out for every choice, without a file of them.")
    split_seed: int | None = flag(
        None,
        "Seed of the held-out rows, of generated data too; if not given, that of the record of the model "
        "that is named, else --seed.",
    )
    max_train_samples: int | None = flag(None, "Use the first so many training rows.")
    max_eval_samples: int | None = flag(None, "Use the first so many of each other set.")

    def __post_init__(self) -> None:
        """Refuse shares and limits that leave nothing to train on or to choose by."""
        if not 0 < self.validation_share < 1:
            raise ValueError(f"`validation_share` must lie between 0 and 1, got {self.validation_share}.")
        check_least(self, max_train_samples=2, max_eval_samples=2)


@dataclass
class ExperimentArguments(BayesianTrainingArguments):
    """Every TrainingArguments flag.

    Attributes:
        fixed: by flag, the only value under which the experiment works, and why.
    """

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "prediction_loss_only": (False, _PREDICTS),
        "eval_do_concat_batches": (True, _PREDICTS),
        "dataloader_drop_last": (False, _PREDICTS),
    }

    def __post_init__(self) -> None:
        """Refuse what is fixed to another value."""
        for name, (value, why) in self.fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` must be {value} in this example, got {getattr(self, name)}: {why}.")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"`seed` must lie between 0 and {_MAX_SEED}, got {self.seed}.")
        check_least(self, num_train_epochs=0)
        super().__post_init__()
        self.dataloader_pin_memory &= torch.cuda.is_available()  # elsewhere it only makes torch warn at every epoch

    def recorded(self) -> dict[str, Any]:
        """What results.json keeps of them."""
        found = self.to_sanitized_dict()
        return {name: value for name, value in found.items() if value is not None and name != "output_dir"}


@dataclass
class BestEpochArguments(ExperimentArguments):
    """Those of trainings that report on the validation set after each epoch, stop early and keep the best epoch."""

    eval_strategy: str = flag("epoch", "When to evaluate: epoch alone.")
    save_strategy: str = flag("epoch", "When to save a checkpoint: epoch alone.")
    save_total_limit: int | None = flag(1, "Checkpoints to keep beside the best.")
    load_best_model_at_end: bool = flag(True, "Keep the best epoch: always.")
    metric_for_best_model: str | None = flag("eval_loss", "What is best: this alone.")
    greater_is_better: bool | None = flag(False, "False, for the least is best.")
    logging_strategy: str = flag("epoch", "When to log: no, steps or epoch.")
    patience: int = flag(4, "Stop a training after so many epochs without a better validation NLL.")
    bayesian_epochs: float = flag(10.0, "Epochs of the ELBO's training.")
    bayesian_learning_rate: float | None = flag(
        None, "Learning rate of trainable means in it; a tenth of --learning_rate if not given."
    )

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **ExperimentArguments.fixed,
        **dict.fromkeys(("eval_strategy", "save_strategy"), ("epoch", _CHOOSES)),
        "load_best_model_at_end": (True, _CHOOSES),
        "metric_for_best_model": ("eval_loss", _CHOOSES),
        "greater_is_better": (False, _CHOOSES),
    }

    def __post_init__(self) -> None:
        """Refuse a training without an end."""
        super().__post_init__()
        check_least(self, patience=1)
        if self.bayesian_epochs < 0:
            raise ValueError(f"`bayesian_epochs` must not be negative, got {self.bayesian_epochs}.")


def check_smoothing(groups: Sequence[Any]) -> None:
    """Refuse an ELBO of a smoothed loss; ``groups`` are the dataclasses of a command line.

    Raises:
        ValueError: labels are smoothed, and another posterior than Laplace's is fitted.
    """
    factor = max((of.label_smoothing_factor for of in groups if isinstance(of, ExperimentArguments)), default=0)
    if factor != 0 and [of.method for of in groups if hasattr(of, "method")] != ["laplace"]:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 in this example, got {factor}: a smoothed loss is no log-likelihood, "
            "and a Bayesian model's loss needs one."
        )
