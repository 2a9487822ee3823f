r"""The calibration loss of a `train()`: its arguments, the thresholds that its warm-up estimates, and its value.

Until step ceil(calibration_warmup_ratio * max_steps) there is no term; the items seen estimate the threshold, as
Krishnan & Tickoo 2020 (arXiv 2012.07923) do:

    threshold = (mean uncertainty of the right + mean uncertainty of the wrong) / 2

over all steps and ranks; where all were right, or all wrong, it is their mean uncertainty. A regression's item is
right if its error abs(y - mean) is at most tau, the mean error so far; after the warm-up tau is that over all
of it. Errors and uncertainties then enter the loss divided by tau, so that it does not depend on the labels' unit.

| loss | c or e | u, or the confidence |
| --- | --- | --- |
| "avuc", "auavu" | c: the averaged prediction's largest probability | its entropy, or the mutual information |
| "eau" | e = abs(y - mean) / tau | sqrt(epistemic + aleatoric variance) / tau |
| "eac" | e = abs(y - mean) / tau | erf(tau / sqrt(2 variance)), the predictive's own chance of an error up to tau |
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..forward import labels_of
from ..likelihoods import HEAD, NoiseStd, ProblemType, get_likelihood, regression_values
from ..likelihoods.registry import likelihoods
from ..losses import auavu_loss, avuc_loss, eac_loss, eau_loss
from ..losses.avu import UNCERTAINTIES, Uncertainty, confidence_and_uncertainty

__all__ = ["CALIBRATION_LOSSES", "CALIBRATION_NAME", "CalibrationArguments", "CalibrationLoss", "CalibrationTerm",
           "check_calibration", "check_calibration_head", "option"]  # fmt: skip

CalibrationLoss = Literal["avuc", "auavu", "eau", "eac"]
CALIBRATION_LOSSES: tuple[CalibrationLoss, ...] = get_args(CalibrationLoss)

_OF_CLASSES = ("avuc", "auavu")

CALIBRATION_NAME = "calibration_loss.json"
_TINY = 1e-12  # a warm-up without any error: tau divides


def option(default: Any, help: str) -> Any:
    """A dataclass's field that `HfArgumentParser` shows with its ``help``."""
    return field(default=default, metadata={"help": help})


@dataclass
class CalibrationArguments:
    """What `BayesianTrainingArguments` has for a calibration loss beside the ELBO; see `training.calibration_term`."""

    calibration_loss: CalibrationLoss | None = option(
        None,
        'A loss beside the ELBO that aligns uncertainty with error: "avuc" or "auavu" for classes, "eau" or "eac" '
        "for regressions.",
    )
    calibration_weight: float = option(1.0, "Factor of the calibration loss, > 0.")
    calibration_warmup_ratio: float = option(
        0.1, "Share of the steps before the calibration loss sets in; they estimate its thresholds."
    )
    calibration_threshold: float | None = option(
        None, "Largest uncertainty that counts as certain: nats, or a regression's unit. Estimated if none."
    )
    calibration_error_threshold: float | None = option(
        None, "Largest error of a regression that counts as low, in its unit. Estimated if not given."
    )
    calibration_uncertainty: Uncertainty = option(
        "predictive_entropy", 'Of classes: "predictive_entropy", or "mutual_information" of several draws per step.'
    )

    @property
    def estimates_threshold(self) -> bool:
        """Whether the warm-up's steps estimate the thresholds."""
        return self.calibration_loss in ("avuc", "eau", "eac") and self.calibration_threshold is None


def check_calibration(args: Any) -> None:
    """Raise ValueError for the first calibration argument that is out of range or does not go with the others."""
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


class CalibrationTerm:
    """See the module's docstring. ``warmup_steps`` is the first step with a term."""

    def __init__(self, args: CalibrationArguments, problem_type: ProblemType, warmup_steps: int) -> None:
        assert args.calibration_loss is not None
        check_calibration_head(args.calibration_loss, problem_type)
        self._args, self._likelihood, self._warmup_steps = args, get_likelihood(problem_type), warmup_steps
        self._sums: list[float] | None = None  # of the warm-up's finished steps, all ranks: see `_observe`
        self._pending: Tensor | None = None  # of the present step, this rank

    # -- the loss ----------------------------------------------------------------------------------------------------

    def __call__(
        self, outputs: Sequence[Any], inputs: Mapping[str, Any], noise_std: NoiseStd | None, step: int
    ) -> Tensor | None:
        """The loss of one micro-batch, with gradient, of the ``outputs`` of its draws; None during the warm-up."""
        if self._likelihood.has_noise:
            return self._regression(outputs, inputs, noise_std, step)
        found = [self._likelihood.labelled_logits(output, inputs) for output in outputs]
        logits, labels = torch.stack([logits for logits, _ in found]), found[0][1]
        kind = self._args.calibration_uncertainty
        if step < self._warmup_steps or not self._knows_threshold:
            if self._args.estimates_threshold:
                with torch.no_grad():
                    is_right, _, spread = confidence_and_uncertainty(logits, labels, kind)
                    self._observe(is_right, spread, spread)
            return None
        if self._args.calibration_loss == "auavu":
            return auavu_loss(logits, labels, uncertainty=kind)
        return avuc_loss(logits, labels, self._threshold, uncertainty=kind)

    def _regression(
        self, outputs: Sequence[Any], inputs: Mapping[str, Any], noise_std: NoiseStd | None, step: int
    ) -> Tensor | None:
        drawn = [regression_values(output, noise_std) for output in outputs]
        values, noise = torch.stack([mean for mean, _ in drawn]), torch.stack([variance for _, variance in drawn])
        mean, variance = values.mean(0), values.var(0, correction=0) + noise.mean(0)
        error = (labels_of(inputs).to(mean).reshape(mean.shape) - mean).abs()
        if step < self._warmup_steps or not self._knows_threshold:
            if self._args.estimates_threshold:
                with torch.no_grad():
                    self._observe_regression(error.flatten(), variance.sqrt().flatten())
            return None
        tau, limit = self._error_threshold, self._threshold
        scale = variance.sqrt()
        if self._args.calibration_loss == "eau":
            return eau_loss(error / tau, scale / tau, 1.0, limit / tau)
        # the predictive's own P(abs(error) <= tau), a falling function of its scale
        confidence = torch.erf(tau / (math.sqrt(2) * scale))
        return eac_loss(error / tau, confidence, 1.0, math.erf(tau / (math.sqrt(2) * limit)))

    # -- thresholds --------------------------------------------------------------------------------------------------

    @property
    def _knows_threshold(self) -> bool:
        return not self._args.estimates_threshold or self._sums is not None

    @property
    def _threshold(self) -> float:
        if self._args.calibration_threshold is not None:
            return self._args.calibration_threshold
        assert self._sums is not None  # `_knows_threshold`
        num_right, right, num_wrong, wrong, _ = self._sums
        means = [total / count for total, count in ((right, num_right), (wrong, num_wrong)) if count]
        return sum(means) / len(means)

    @property
    def _error_threshold(self) -> float:
        if self._args.calibration_error_threshold is not None:
            return self._args.calibration_error_threshold
        assert self._sums is not None
        return max(self._sums[4] / (self._sums[0] + self._sums[2]), _TINY)

    def _observe(self, is_right: Tensor, spread: Tensor, error: Tensor) -> None:
        """Adds this micro-batch's (n, sum u) of the right, the same of the wrong, and sum e."""
        wrong = ~is_right
        parts = [is_right.sum(), spread[is_right].sum(), wrong.sum(), spread[wrong].sum(), error.sum()]
        sums = torch.stack([part.float() for part in parts])
        self._pending = sums if self._pending is None else self._pending + sums

    def _observe_regression(self, error: Tensor, spread: Tensor) -> None:
        seen = torch.zeros(5, device=error.device) if self._pending is None else self._pending
        if self._sums is not None:
            seen = seen + torch.tensor(self._sums, device=error.device)
        mean = (seen[4] + error.sum()) / (seen[0] + seen[2] + error.numel())
        self._observe(error <= mean, spread, error)

    def fold(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device, step: int) -> None:
        """Add the finished step's items of all ranks; called by every rank, before the next step and before a save.

        Args:
            sum_over_ranks: of a tensor (5,).
            device: where that is done.
            step: the optimizer steps so far.
        """
        if not self._args.estimates_threshold or (step > self._warmup_steps and self._sums is not None):
            return
        own = torch.zeros(5, device=device) if self._pending is None else self._pending
        total, self._pending = sum_over_ranks(own).tolist(), None
        if total[0] + total[2] > 0:
            before = [0.0] * 5 if self._sums is None else self._sums
            self._sums = [old + new for old, new in zip(before, total, strict=True)]

    def report(self) -> dict[str, float]:
        """The log's entries: the thresholds in use, or as estimated so far."""
        if self._args.calibration_loss == "auavu" or not self._knows_threshold:
            return {}
        found = {"calibration_threshold": self._threshold}
        if self._likelihood.has_noise:
            found["calibration_error_threshold"] = self._error_threshold
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what the warm-up has seen so far."""
        if self._sums is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CALIBRATION_NAME).write_text(json.dumps({"sums": self._sums}))

    def load(self, folder: Path, step: int) -> None:
        """Go on from `save`; raise ValueError where the warm-up is over and the checkpoint has no threshold."""
        path = folder / CALIBRATION_NAME
        if not self._args.estimates_threshold:
            return
        if path.is_file():
            self._sums = json.loads(path.read_text())["sums"]
        elif step >= self._warmup_steps:
            raise ValueError(
                f"`resume_from_checkpoint` {str(folder)!r} is past the warm-up and holds no threshold, as it was made "
                "without `calibration_loss`: give `calibration_threshold`."
            )
