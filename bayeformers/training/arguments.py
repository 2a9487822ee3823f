"""`BayesianTrainingArguments`: what `BayesianTrainer` reads besides transformers' `TrainingArguments`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from ..checks import check_choice, check_count, check_number
from ..likelihoods import HEAD, NoiseStd
from ..linearized.links import LINKS, Link
from ..linearized.methods import METHODS, SAMPLING, Method
from .alignment_arguments import CalibrationArguments, check_calibration
from .direction import CONTRADICTED, is_lower_better

__all__ = ["BayesianTrainingArguments", "parse_noise_std"]

DRAW_CACHE_BYTES = 2 * 1024**3

if TYPE_CHECKING:
    NoiseArgument = str | float
else:
    NoiseArgument = str  # HfArgumentParser would take a union with str for its other type and refuse "residual"


def parse_noise_std(value: str | float) -> NoiseStd | None:
    """Return the noise that `noise_std` names: "head", a number, or None for "residual" (estimated on training data).

    Raises:
        ValueError: it is none of these.

    >>> parse_noise_std("residual") is None, parse_noise_std("0.5"), parse_noise_std("head")
    (True, 0.5, 'head')
    """
    if value == HEAD:
        return HEAD
    if value == "residual":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        raise ValueError(f'`noise_std` must be "residual", "head" or a finite number > 0, got {value!r}.')
    return number


@dataclass
class BayesianTrainingArguments(CalibrationArguments, TrainingArguments):
    """`TrainingArguments` with the ELBO's and the Monte-Carlo evaluation's choices; works with `HfArgumentParser`.

    >>> args = BayesianTrainingArguments("out", kl_weight=0.1, report_to="none")
    >>> args.num_eval_samples, args.rho_learning_rate
    (16, 0.01)
    """

    num_train_samples: int = field(
        default=1, metadata={"help": "Weight draws per training forward; the NLL is averaged over them."}
    )
    kl_weight: float = field(
        default=1.0, metadata={"help": "Factor of the KL in the loss; 1 is the ELBO, below 1 a colder posterior."}
    )
    kl_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the training steps over which the KL's weight rises linearly from 0."}
    )
    rho_learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Learning rate of rho, which sets the scales; Adam moves log sigma by about that."},
    )
    num_eval_samples: int = field(
        default=16, metadata={"help": "Weight draws that `evaluate` and `predict` average over."}
    )
    num_eval_samples_during_training: int | None = field(
        default=None, metadata={"help": "Draws of the evaluations inside `train`; as `num_eval_samples` if not given."}
    )
    eval_seed: int = field(
        default=0, metadata={"help": "Seed of the evaluation draws: the same networks on every batch and process."}
    )
    eval_method: Method | None = field(
        default=None,
        metadata={
            "help": 'How to predict: "sample" (or "nn") the network, or linearise it: "glm" with the exact covariance '
            'of its logits, or "mc_glm", "one_glm", "lr_glm", "e_glm". The posterior\'s own default if not given.'
        },
    )
    eval_link: Link = field(
        default="auto",
        metadata={
            "help": 'Of a linearised prediction, from Gaussian logits to probabilities: "probit", "mc", "bridge" or '
            '"probit_diagonal"; "auto": probit for two classes and for labels, Monte Carlo for more classes.'
        },
    )
    num_training_items: int | None = field(
        default=None,
        metadata={"help": "N of the ELBO in the loss's unit (examples or label tokens); counted if not given."},
    )
    draw_cache_bytes: int = field(
        default=DRAW_CACHE_BYTES, metadata={"help": "Memory in which evaluation may keep its weight draws, in bytes."}
    )
    noise_std: NoiseArgument = field(
        default="residual",
        metadata={
            "help": 'Standard deviation of the noise of a regression; "residual": its RMSE on training data; "head": '
            "the model predicts it, with L means and then L log variances for L targets."
        },
    )

    def __post_init__(self) -> None:
        self.check_bayesian()
        self._is_direction_open = self.greater_is_better is None  # no field: a replaced object has the value for given
        self.settle_direction()
        super().__post_init__()  # type: ignore[no-untyped-call]
        for declared in fields(self):  # a hyperparameter search casts to the type it finds: int(0.25) of a whole number
            if isinstance(declared.default, float) and type(value := getattr(self, declared.name)) is int:
                setattr(self, declared.name, float(value))

    def settle_direction(self, eval_datasets: Iterable[str] = ()) -> str | None:
        """Return what to say of a `greater_is_better` that contradicts our metric; set it to False where not given.

        ``eval_datasets``: their names where there are several; only the trainer knows them.
        """
        if not is_lower_better(self.metric_for_best_model, eval_datasets):
            return None
        if self._is_direction_open:
            self.greater_is_better = False
        return CONTRADICTED.format(self.metric_for_best_model) if self.greater_is_better else None

    def check_bayesian(self) -> None:
        """Raise ValueError for the first argument out of its range; nothing has been set up by then."""
        check_count("num_train_samples", self.num_train_samples, 1)
        check_count("num_eval_samples", self.num_eval_samples, 1)
        check_count("eval_seed", self.eval_seed, 0)
        check_count("draw_cache_bytes", self.draw_cache_bytes, 0)
        if self.num_eval_samples_during_training is not None:
            check_count("num_eval_samples_during_training", self.num_eval_samples_during_training, 1)
        if self.num_training_items is not None:
            check_count("num_training_items", self.num_training_items, 1)
        self._check_prediction()
        check_number("kl_weight", self.kl_weight, 0.0)
        check_number("kl_warmup_ratio", self.kl_warmup_ratio, 0.0, 1.0)
        check_number("rho_learning_rate", self.rho_learning_rate, 0.0, strict=True)
        self.noise_std = parse_noise_std(self.noise_std) or "residual"
        check_calibration(self)

    def _check_prediction(self) -> None:
        if self.eval_method is not None:
            check_choice("eval_method", self.eval_method, METHODS)
        check_choice("eval_link", self.eval_link, LINKS)
        if self.eval_method in SAMPLING and self.eval_link != "auto":
            raise ValueError(
                f'`eval_link` must be "auto" with `eval_method`={self.eval_method!r}, which averages probabilities '
                f"and has no Gaussian logits, got {self.eval_link!r}."
            )
