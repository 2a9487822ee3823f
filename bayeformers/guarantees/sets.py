r"""`PredictionSets`: the classes that a posterior cannot rule out, with a share of misses that was set beforehand.

A set holds the classes whose score (see `nonconformity`) is at most a threshold q of split conformal prediction, see
`quantiles`. Of a multi-label head the score of an example is that of its worst true label, so that a set holds *all*
true labels with probability at least 1 - alpha (Cauchois et al. 2021, arXiv 2004.10181); or q is that of conformal risk
control, and the expected share of true labels that a set lacks is at most alpha (Angelopoulos et al. 2024, arXiv
2208.02814, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_number
from ..predictive import Predictive
from .classes import MULTI_LABEL, device_of, log_probs_of
from .files import read_record, write_record
from .nonconformity import METHODS, SetMethod, class_scores
from .quantiles import ALL, Cutoffs, check_alpha, coverage_interval, group_keys

__all__ = ["SETS_FILE", "PredictionSets", "SetScore"]

SETS_FILE = "prediction_sets.json"
"""Of a model's folder."""

By = Literal["all", "class", "group"]
Promise = Literal["coverage", "fnr"]
CALIBRATION, PREDICTION = 0, 1
"""Two streams of uniform numbers under one seed, so that those of calibration and of prediction are independent."""


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """How badly a class fits, with its options.

    Args:
        method: "lac", the smallest sets on average; "aps", sets that grow with the uncertainty of the input; "raps",
            the same with a penalty on long ones.
        randomized: whether the last class of "aps" and "raps" is in by chance, so that coverage is exact; otherwise it
            is always in, and sets are larger.
        penalty: lambda of "raps"; None: chosen on a fifth of the rows, for the smallest sets there.
        k_reg: how many classes cost nothing; None: on these rows the rank of the true class that 1 - alpha have.

    Raises:
        ValueError: an option is out of range, or is of another method.
    """

    method: SetMethod = "lac"
    randomized: bool = True
    penalty: float | None = None
    k_reg: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        if self.method != "raps" and (self.penalty is not None or self.k_reg is not None):
            raise ValueError(f'`penalty` and `k_reg` are of "raps", got `method`={self.method!r}.')
        if self.penalty is not None:
            check_number("penalty", self.penalty, 0.0)
        if self.k_reg is not None:
            check_count("k_reg", self.k_reg, 0)

    @property
    def is_random(self) -> bool:
        """Whether a score needs a uniform number."""
        return self.randomized and self.method != "lac"

    def of_classes(self, log_probs: Tensor, seed: int, stream: int) -> Tensor:
        """Score every class; the options must be known.

        Args:
            log_probs: (B, C), in float64.
            seed: of the uniform numbers, one per example.
            stream: which of them: `CALIBRATION` or `PREDICTION`.

        Returns:
            (B, C), higher for what fits worse.
        """
        # NumPy's: torch's CPU generator takes only 32 bits of a seed, which leaves no room for a stream
        drawn = np.random.default_rng([seed, stream]).random(len(log_probs)) if self.is_random else None
        uniforms = None if drawn is None else torch.from_numpy(drawn)
        return class_scores(log_probs, self.method, uniforms, self.penalty or 0.0, self.k_reg or 0)


@dataclass(frozen=True, kw_only=True)
class PredictionSets:
    """Thresholds for sets of classes, and all that is needed to make and to describe them.

    Attributes:
        alpha: the share of misses allowed.
        score: how classes are scored.
        num_classes: C, or the number of labels.
        problem_type: of the head.
        by: whether the promise is over all inputs, "class" by true class, or "group" by group.
        promise: "coverage", or of a multi-label head "fnr".
        allow_empty: whether a set may hold no class; otherwise the likeliest is in.
        cutoffs: threshold and rows by class, by group, or of "all".
        num_samples: draws of the predictions; None where probabilities were given.
        weights: a digest of the model's weights; None where probabilities were given.
    """

    alpha: float
    score: SetScore
    num_classes: int
    cutoffs: Cutoffs
    problem_type: str = "single_label_classification"
    by: By = "all"
    promise: Promise = "coverage"
    allow_empty: bool = True
    num_samples: int | None = None
    weights: str | None = None

    @property
    def num_examples(self) -> int:
        """The calibration rows of all groups; of several labels one row may count for more than one."""
        return sum(cutoff.num_rows for cutoff in self.cutoffs.values())

    def predict(
        self, predictive_or_probs: Predictive | Tensor | Any, *, groups: Sequence[Any] | None = None, seed: int = 0
    ) -> Tensor:
        """Return which classes are in the set of each input.

        Args:
            predictive_or_probs: the prediction, or probabilities (B, C), of several labels (B, L) their presence's; by
                the same posterior and method as the calibration rows'.
            groups: of each input, where thresholds go by group; one that no calibration row had gets every class.
            seed: of the chance in randomised scores: give every batch another.

        Returns:
            (B, C), bool.

        Raises:
            ValueError: another number of classes, or groups that are missing or not asked for.
        """
        check_count("seed", seed, 0)
        log_probs, problem_type = log_probs_of(predictive_or_probs, self.problem_type)
        if problem_type != self.problem_type or log_probs.shape[1] != self.num_classes:
            raise ValueError(
                f"`predictive_or_probs` must be of a {self.problem_type!r} head with {self.num_classes} classes, as "
                f"the calibration rows', got {problem_type!r} with {log_probs.shape[1]}."
            )
        if (groups is None) == (self.by == "group"):
            raise ValueError("`groups` are needed where the thresholds go by group, and only there.")
        scores = self.score.of_classes(log_probs, seed, PREDICTION)
        sets = scores <= self._limits(len(scores), groups)
        if not self.allow_empty:
            is_empty = ~sets.any(1, keepdim=True)
            sets |= is_empty & (log_probs == log_probs.amax(1, keepdim=True))
        return sets.to(device_of(predictive_or_probs))

    def _limits(self, num_rows: int, groups: Sequence[Any] | None) -> Tensor:
        """Thresholds that broadcast against (B, C)."""
        if groups is not None:
            return self.cutoffs.thresholds(group_keys(groups, num_rows))[:, None]
        keys: Sequence[Hashable] = range(self.num_classes) if self.by == "class" else [ALL]
        return self.cutoffs.thresholds(keys)[None]

    def coverage_interval(self, level: float = 0.95) -> dict[Hashable, tuple[float, float]]:
        """Where the share of inputs whose set holds the truth will lie, by class, group, or of "all".

        Args:
            level: the probability of that, over draws of the calibration rows; of scores without ties.

        Returns:
            The intervals, of Beta(k, n + 1 - k), see `quantiles`.

        Raises:
            ValueError: the promise is another, whose law is not known.
        """
        if self.promise != "coverage":
            raise ValueError(f"The law of the coverage is known for `promise`='coverage', not {self.promise!r}.")
        found = {}
        for key, cutoff in self.cutoffs.items():
            low, high = coverage_interval(cutoff.num_rows, self.alpha, level)
            found[key] = (low, high) if math.isfinite(cutoff.threshold) else (1.0, 1.0)
        return found

    def describe(self) -> str:
        """Say in two sentences what is promised, and what it rests on."""
        what = "the true class"
        if self.problem_type == MULTI_LABEL:
            what = "each true label" if self.by == "class" else "all true labels"
        promised = f"hold {what} of at least {1 - self.alpha:.4g} of the inputs"
        if self.promise == "fnr":
            promised = f"lack at most {self.alpha:.4g} of the true labels on average"
        where = {"all": "", "class": ", class by class", "group": ", group by group"}[self.by]
        said = f"Prediction sets ({self.score.method.upper()}) {promised} that come as the calibration rows did{where}."
        if self.by != "all":
            counts = [cutoff.num_rows for cutoff in self.cutoffs.values()]
            open_ = sum(math.isinf(cutoff.threshold) for cutoff in self.cutoffs.values())
            rest = f" They rest on {min(counts)} to {max(counts)} rows for each of {len(counts)} of these"
            return said + rest + (f", of which {open_} have too few rows to leave anything out." if open_ else ".")
        said += f" They rest on {self.num_examples} rows"
        if math.isinf(self.cutoffs[ALL].threshold):
            return said + ", too few to leave any class out."
        if self.promise == "fnr":
            return said + "."
        low, high = coverage_interval(self.num_examples, self.alpha)
        return said + f", with which the share lies in {low:.3f} to {high:.3f} (95 %; above, where scores are equal)."

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        score = {each.name: getattr(self.score, each.name) for each in fields(self.score)}
        return {**own, "score": score, "cutoffs": self.cutoffs.to_list()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PredictionSets:
        """Return what `to_dict` wrote, without entries of newer versions.

        Raises:
            ValueError: an entry is missing or wrong.
        """
        known = {each.name for each in fields(cls)}
        own = {name: value for name, value in record.items() if name in known}
        try:
            score = {each.name: own["score"][each.name] for each in fields(SetScore)}
            sets = cls(**{**own, "score": SetScore(**score), "cutoffs": Cutoffs.from_list(own["cutoffs"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"The record of prediction sets is damaged: {error!r}.") from error
        check_alpha(sets.alpha)
        check_choice("by", sets.by, ("all", "class", "group"))
        check_choice("promise", sets.promise, ("coverage", "fnr"))
        return sets

    def save(self, directory: str | PathLike[str]) -> None:
        """Write `SETS_FILE` into a folder, or the file itself."""
        write_record(directory, SETS_FILE, self.to_dict())

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> PredictionSets:
        """Return what `save` wrote; ValueError for a file that is missing or damaged."""
        return cls.from_dict(read_record(directory, SETS_FILE))
