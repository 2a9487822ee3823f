"""`BayesianArguments`: what `BayesianTrainer` reads besides transformers' `TrainingArguments`, and the two as one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from transformers import TrainingArguments

from ..checks import check_choice, check_count, check_number
from ..likelihoods import HEAD, NoiseStd
from ..linearized.links import LINKS, Link
from ..linearized.methods import METHODS, SAMPLING, Method
from .alignment import CalibrationArguments, check_calibration, option

__all__ = ["LOWER_IS_BETTER", "BayesianArguments", "BayesianTrainingArguments", "is_lower_better", "parse_noise_std"]

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


LOWER_IS_BETTER = frozenset(
    {"nll", "ece", "brier", "aurc", "rmse", "predictive_entropy", "expected_entropy", "mutual_information"}
    | {"epistemic_variance", "aleatoric_variance"}
)
"""What an evaluation adds: all of them. transformers takes larger for better unless a name ends in "loss"."""

CONTRADICTED = (
    "`greater_is_better` is True, but a smaller `metric_for_best_model`={!r} is better: the worst model would be kept "
    "as the best. Leave `greater_is_better` out, or set it to False."
)


def is_lower_better(metric: str | None, datasets: Iterable[str] = ()) -> bool:
    """Return whether ``metric`` is ours, named as transformers takes it: "nll", "eval_nll" or "eval_<dataset>_nll".

    ``datasets``: names of the evaluation datasets where there are several.

    >>> is_lower_better("nll"), is_lower_better("eval_dev_nll", ["dev"]), is_lower_better("eval_accuracy")
    (True, True, False)
    """
    if metric is None:
        return False
    name, prefixes = metric.removeprefix("eval_"), ("", *(f"{dataset}_" for dataset in datasets))
    return any(name.removeprefix(prefix) in LOWER_IS_BETTER for prefix in prefixes)


@dataclass
class BayesianArguments(CalibrationArguments):
    """The ELBO's and the Monte-Carlo evaluation's choices alone, in front of the arguments of another trainer.

    Fields and defaults of the other class stay as they are:

        @dataclass
        class BayesianSFTConfig(BayesianArguments, SFTConfig): ...

    >>> from transformers import Seq2SeqTrainingArguments
    >>> @dataclass
    ... class Arguments(BayesianArguments, Seq2SeqTrainingArguments):
    ...     "Of a `BayesianTrainerMixin` before a `Seq2SeqTrainer`."
    >>> args = Arguments("out", kl_weight=0.1, predict_with_generate=True, report_to="none")
    >>> args.num_eval_samples, args.rho_learning_rate
    (16, 0.01)

    Raises:
        TypeError: the class is no dataclass, or the arguments of no trainer stand behind this one among its bases.
    """

    num_train_samples: int = option(1, "Weight draws per training forward; the NLL is averaged over them.")
    kl_weight: float = option(1.0, "Factor of the KL in the loss; 1 is the ELBO, below 1 a colder posterior.")
    kl_warmup_ratio: float = option(
        0.0, "Share of the training steps over which the KL's weight rises linearly from 0."
    )
    rho_learning_rate: float = option(
        1e-2, "Learning rate of rho, which sets the scales; Adam moves log sigma by about that."
    )
    num_eval_samples: int = option(16, "Weight draws that `evaluate` and `predict` average over.")
    num_eval_samples_during_training: int | None = option(
        None, "Draws of the evaluations inside `train`; as `num_eval_samples` if not given."
    )
    eval_seed: int = option(0, "Seed of the evaluation draws: the same networks on every batch and process.")
    eval_method: Method | None = option(
        None,
        'How to predict: "sample" (or "nn") the network, or linearise it: "glm" with the exact covariance of its '
        'logits, or "mc_glm", "one_glm", "lr_glm", "e_glm". The posterior\'s own default if not given.',
    )
    eval_link: Link = option(
        "auto",
        'Of a linearised prediction, from Gaussian logits to probabilities: "probit", "mc", "bridge" or '
        '"probit_diagonal"; "auto": probit for two classes and for labels, Monte Carlo for more classes.',
    )
    num_training_items: int | None = option(
        None, "N of the ELBO in the loss's unit (examples or label tokens); counted if not given."
    )
    draw_cache_bytes: int = option(DRAW_CACHE_BYTES, "Memory in which evaluation may keep its weight draws, in bytes.")
    noise_std: NoiseArgument = option(
        "residual",
        'Standard deviation of the noise of a regression; "residual": its RMSE on training data; "head": the model '
        "predicts it, with L means and then L log variances for L targets.",
    )

    if TYPE_CHECKING:  # of `TrainingArguments`, which comes behind this class
        greater_is_better: bool | None = None
        metric_for_best_model: str | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Raise TypeError for a class that would lack its fields, or stand before none of transformers' arguments."""
        behind = cls.__mro__[cls.__mro__.index(BayesianArguments) :]
        if TrainingArguments not in behind or "__dataclass_fields__" not in vars(cls):
            raise TypeError(
                f"`{cls.__name__}` must be a dataclass whose bases are `BayesianArguments` and then the arguments of a "
                f"trainer, got the bases {[base.__name__ for base in cls.__bases__]}. Write `@dataclass` above `class "
                f"{cls.__name__}(BayesianArguments, SFTConfig)`."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.check_bayesian()
        self._is_direction_open = self.greater_is_better is None  # no field: a replaced object has the value for given
        self.settle_direction()
        super().__post_init__()  # type: ignore[misc]
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


@dataclass
class BayesianTrainingArguments(BayesianArguments, TrainingArguments):
    """`TrainingArguments` with the ELBO's and the Monte-Carlo evaluation's choices; works with `HfArgumentParser`.

    >>> args = BayesianTrainingArguments("out", kl_weight=0.1, report_to="none")
    >>> args.num_eval_samples, args.rho_learning_rate
    (16, 0.01)
    """
