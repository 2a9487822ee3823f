r"""`PredictionIntervals`: where a regression's label lies, with a share of misses that was set beforehand.

    |y - mean| / s  <=  q,    so    mean - q s  <=  y  <=  mean + q s

with q of split conformal prediction (see `quantiles`) and s the posterior's own standard deviation of the input, so
that intervals are wide where the model is unsure (Papadopoulos et al. 2008; Lei et al. 2018, section 5.2), or 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_count, plain
from ..predictive import Predictive
from .files import read_record, write_record
from .quantiles import ALL, Cutoffs, check_alpha, coverage_interval, group_keys

__all__ = ["INTERVALS_FILE", "PredictionIntervals", "Scale", "keys_of", "located"]

INTERVALS_FILE = "prediction_intervals.json"
"""Of a model's folder."""

Scale = Literal["predictive", "epistemic", "none"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True, kw_only=True)
class PredictionIntervals:
    """Thresholds for intervals around a regression's mean, and all that is needed to make and to describe them.

    Attributes:
        alpha: the share of misses allowed.
        scale: what the distance to the mean is divided by: "predictive", the standard deviation of weights and noise
            together; "epistemic", that of the weights; "none".
        num_outputs: L of the head; 1 for one value per input.
        by: whether the promise is over all inputs, or "group" by group.
        cutoffs: threshold and rows by group and output, or by output; see `predict`.
        num_samples: draws of the predictions; None where means were given.
        weights: a digest of the model's weights; None where means were given.
    """

    alpha: float
    scale: Scale
    num_outputs: int
    cutoffs: Cutoffs
    by: Literal["all", "group"] = "all"
    num_samples: int | None = None
    weights: str | None = None

    def predict(self, predictive: Predictive | Sequence[Any], *, groups: Sequence[Any] | None = None) -> Tensor:
        """Return the ends of each input's interval; of several outputs each holds its own label as often as promised.

        Args:
            predictive: the prediction, by the same posterior and method as the calibration rows'; or the means (B,) or
                (B, L), and with a scale a pair of the means and the standard deviations.
            groups: of each input, where thresholds go by group; one that no calibration row had gets the whole line.

        Returns:
            (B, 2), of several outputs (B, L, 2).

        Raises:
            ValueError: no regression, another number of outputs, or groups that are missing or not asked for.
        """
        mean, scale = located(predictive, self.scale)
        if mean.shape[1] != self.num_outputs:
            raise ValueError(f"`predictive` must have {self.num_outputs} outputs, got {mean.shape[1]}.")
        if (groups is None) == (self.by == "group"):
            raise ValueError("`groups` are needed where the thresholds go by group, and only there.")
        limits = self._limits(len(mean), groups)
        # an infinite threshold is the whole line, for inputs of no scale too, where the product would be NaN
        reach = torch.where(limits.isinf(), limits, limits * scale)
        ends = torch.stack([mean - reach, mean + reach], dim=-1)
        device = predictive.mean.device if isinstance(predictive, Predictive) else ends.device
        return (ends[:, 0] if self.num_outputs == 1 else ends).to(device)

    def _limits(self, num_rows: int, groups: Sequence[Any] | None) -> Tensor:
        """Thresholds, (B, L)."""
        keys = [ALL] * num_rows if groups is None else group_keys(groups, num_rows)
        return torch.stack([self.cutoffs.thresholds(own) for own in keys_of(keys, self.num_outputs)], dim=1)

    def describe(self) -> str:
        """Say in two sentences what is promised, and what it rests on."""
        where = "" if self.by == "all" else ", group by group"
        scaled = {"predictive": "standard deviation", "epistemic": "epistemic standard deviation"}.get(self.scale)
        wide = "of one width" if scaled is None else f"in proportion to the posterior's {scaled}"
        counts = [cutoff.num_rows for cutoff in self.cutoffs.values()]
        said = (
            f"Prediction intervals {wide} hold the label of at least {1 - self.alpha:.4g} of the inputs that come as "
            f"the calibration rows did{where}. They rest on {min(counts)}"
        )
        if any(math.isinf(cutoff.threshold) for cutoff in self.cutoffs.values()):
            return f"{said} rows{'' if self.by == 'all' else ' or more each'}, too few for a finite interval."
        if self.by == "group":
            return f"{said} to {max(counts)} rows of each group."
        low, high = coverage_interval(counts[0], self.alpha)
        return f"{said} rows, with which the share lies in {low:.3f} to {high:.3f} (95 %)."

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            **{each.name: plain(getattr(self, each.name)) for each in fields(self)},
            "cutoffs": self.cutoffs.to_list(),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PredictionIntervals:
        """Return what `to_dict` wrote, without entries of newer versions.

        Raises:
            ValueError: an entry is missing or wrong.
        """
        known = {each.name for each in fields(cls)}
        own = {name: value for name, value in record.items() if name in known}
        try:
            intervals = cls(**{**own, "cutoffs": Cutoffs.from_list(own["cutoffs"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"The record of prediction intervals is damaged: {error!r}.") from error
        check_alpha(intervals.alpha)
        check_choice("scale", intervals.scale, SCALES)
        check_choice("by", intervals.by, ("all", "group"))
        check_count("num_outputs", intervals.num_outputs, 1)
        return intervals

    def save(self, directory: str | PathLike[str]) -> None:
        """Write `INTERVALS_FILE` into a folder, or the file itself."""
        write_record(directory, INTERVALS_FILE, self.to_dict())

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> PredictionIntervals:
        """Return what `save` wrote; ValueError for a file that is missing or damaged."""
        return cls.from_dict(read_record(directory, INTERVALS_FILE))


def located(predictive: Any, scale: str) -> tuple[Tensor, Tensor]:
    """Return the means and what distances to them are divided by, (B, L) each, in float64 on the CPU.

    Args:
        predictive: a regression's; or means, with a scale a pair of means and standard deviations >= 0.
        scale: one of `Scale`.

    Returns:
        Means, and scales.

    Raises:
        ValueError: no regression; a scale that is not known, negative or no number.
    """
    if isinstance(predictive, Predictive):
        mean, deviation = _of_predictive(predictive, scale)
    else:
        mean, deviation = _of_numbers(predictive, scale)
    if not bool(mean.isfinite().all()) or not bool((deviation >= 0).all()):
        raise ValueError("`predictive` must have finite means, and standard deviations >= 0.")
    return mean, deviation


def _of_predictive(predictive: Predictive, scale: str) -> tuple[Tensor, Tensor]:
    if predictive.values is None:
        raise ValueError(
            f"Intervals are for a regression, got a {predictive.problem_type!r} predictive: see `fit_prediction_sets`."
        )
    mean = predictive.mean.detach().to("cpu", torch.float64)
    mean = mean.reshape(len(mean), -1)
    if scale == "none":
        return mean, torch.ones_like(mean)
    variance = predictive.epistemic_variance
    if scale == "predictive":
        try:
            variance = variance + predictive.aleatoric_variance
        except ValueError as error:
            raise ValueError(f'{error} Or take `scale`="epistemic" or "none".') from error
    return mean, variance.detach().to("cpu", torch.float64).reshape(mean.shape).sqrt()


def _of_numbers(given: Any, scale: str) -> tuple[Tensor, Tensor]:
    parts = given if scale != "none" else (given,)
    if scale != "none" and not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise ValueError(f"With `scale`={scale!r} give a pair of means and standard deviations, got {type(given)}.")
    try:
        tensors = [torch.as_tensor(part).detach().to("cpu", torch.float64) for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Means must be numbers, (B,) or (B, L), got {type(given).__name__}.") from error
    if tensors[0].dim() not in (1, 2) or tensors[-1].shape != tensors[0].shape:
        raise ValueError(
            "Means must have the shape (B,) or (B, L), and standard deviations the same, got "
            f"{[tuple(tensor.shape) for tensor in tensors]}."
        )
    mean, deviation = (tensor.reshape(len(tensor), -1) for tensor in (tensors[0], tensors[-1]))
    return mean, deviation if scale != "none" else torch.ones_like(mean)


def keys_of(groups: Sequence[Hashable], num_outputs: int) -> list[list[Hashable]]:
    """Return by output the key of each row's threshold, which JSON keeps: the group alone where there is one output.

    >>> keys_of(["a", "b"], 1), keys_of(["a"], 2)
    ([['a', 'b']], [["'a'/0"], ["'a'/1"]])
    """
    if num_outputs == 1:
        return [list(groups)]
    return [[f"{group!r}/{output}" for group in groups] for output in range(num_outputs)]
