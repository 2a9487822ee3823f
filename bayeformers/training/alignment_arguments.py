"""The calibration loss's arguments, and which heads each loss is for."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..checks import check_choice, check_number
from ..likelihoods import HEAD, ProblemType
from ..likelihoods.registry import likelihoods
from ..losses.avu import UNCERTAINTIES, Uncertainty

__all__ = ["CALIBRATION_LOSSES", "CalibrationArguments", "CalibrationLoss", "check_calibration_head"]

CalibrationLoss = Literal["avuc", "auavu", "eau", "eac"]
CALIBRATION_LOSSES: tuple[CalibrationLoss, ...] = get_args(CalibrationLoss)

_OF_CLASSES = ("avuc", "auavu")


@dataclass
class CalibrationArguments:
    """What `BayesianTrainingArguments` has for a calibration loss beside the ELBO; see `training.calibration_term`."""

    calibration_loss: CalibrationLoss | None = field(
        default=None,
        metadata={
            "help": 'A loss beside the ELBO that aligns uncertainty with error: "avuc" or "auavu" for classes, '
            '"eau" or "eac" for regressions.'
        },
    )
    calibration_weight: float = field(default=1.0, metadata={"help": "Factor of the calibration loss, > 0."})
    calibration_warmup_ratio: float = field(
        default=0.1,
        metadata={"help": "Share of the steps before the calibration loss sets in; they estimate its thresholds."},
    )
    calibration_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Largest uncertainty that counts as certain: nats, or a regression's unit. Estimated if none."
        },
    )
    calibration_error_threshold: float | None = field(
        default=None,
        metadata={"help": "Largest error of a regression that counts as low, in its unit. Estimated if not given."},
    )
    calibration_uncertainty: Uncertainty = field(
        default="predictive_entropy",
        metadata={"help": 'Of classes: "predictive_entropy", or "mutual_information" of several draws per step.'},
    )

    @property
    def estimates_threshold(self) -> bool:
        """Whether the warm-up's steps estimate the thresholds."""
        return self.calibration_loss in ("avuc", "eau", "eac") and self.calibration_threshold is None


def check_calibration(args: Any) -> None:
    """Errors: ValueError for the first calibration argument that is out of range or does not go with the others."""
    check_number("calibration_weight", args.calibration_weight, 0.0, strict=True)
    check_number("calibration_warmup_ratio", args.calibration_warmup_ratio, 0.0, 1.0)
    check_choice("calibration_uncertainty", args.calibration_uncertainty, UNCERTAINTIES)
    thresholds = ("calibration_threshold", "calibration_error_threshold")
    given = [name for name in thresholds if getattr(args, name) is not None]
    for name in given:
        check_number(name, getattr(args, name), 0.0, strict=True)
    loss = args.calibration_loss
    if loss is None:
        if given:
            raise ValueError(f"`{given[0]}` needs `calibration_loss`, one of {CALIBRATION_LOSSES}, got None.")
        return
    check_choice("calibration_loss", loss, CALIBRATION_LOSSES)
    _check_thresholds(args, given)
    _check_spread(args)


def _check_thresholds(args: Any, given: list[str]) -> None:
    loss = args.calibration_loss
    if args.calibration_warmup_ratio == 1:
        raise ValueError("`calibration_warmup_ratio` must be below 1, got 1: the calibration loss would never set in.")
    if args.estimates_threshold and args.calibration_warmup_ratio == 0:
        raise ValueError(
            "`calibration_warmup_ratio` must be > 0 for the warm-up to estimate a threshold, got 0: "
            "or give `calibration_threshold`."
        )
    if loss == "auavu" and given:
        raise ValueError(
            f'`{given[0]}` must be None with `calibration_loss`="auavu", which integrates over thresholds.'
        )
    if loss == "avuc" and "calibration_error_threshold" in given:
        raise ValueError(
            '`calibration_error_threshold` is a regression\'s ("eau", "eac"), got `calibration_loss`="avuc".'
        )
    if loss in ("eau", "eac") and len(given) == 1:
        raise ValueError(
            f"`calibration_threshold` and `calibration_error_threshold` go together for {loss!r}, got one: give "
            "both, or neither to have them estimated."
        )


def _check_spread(args: Any) -> None:
    """A loss of an uncertainty that is the same for all inputs would have no gradient."""
    if args.num_train_samples > 1:
        return
    if args.calibration_loss in _OF_CLASSES and args.calibration_uncertainty == "mutual_information":
        raise ValueError(
            '`calibration_uncertainty`="mutual_information" is 0 for one draw: set `num_train_samples` >= 2, '
            f"got {args.num_train_samples}."
        )
    if args.calibration_loss in ("eau", "eac") and args.noise_std != HEAD:
        raise ValueError(
            f"`calibration_loss`={args.calibration_loss!r} needs an uncertainty that differs between inputs: set "
            f'`num_train_samples` >= 2, got {args.num_train_samples}, or `noise_std`="head", got {args.noise_std!r}.'
        )


def check_calibration_head(loss: CalibrationLoss, problem_type: ProblemType) -> None:
    """Raise ValueError for a head that the loss is not for."""
    is_of_classes = loss in _OF_CLASSES
    allowed = [own.problem_type for own in likelihoods() if (own.has_item_logits if is_of_classes else own.has_noise)]
    if problem_type not in allowed:
        other = 'a regression takes "eau" or "eac"' if is_of_classes else 'classes take "avuc" or "auavu"'
        raise ValueError(
            f"`calibration_loss`={loss!r} is for {', '.join(allowed)}, got a {problem_type} head: {other}."
        )
