"""`AbstentionPolicy`: from which score on a model answers, and what that promises."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_number, is_real
from ..predictive import Predictive
from .files import read_record, write_record
from .scores import SCORES, score_of

__all__ = ["POLICY_FILE", "PREDICTED", "AbstentionPolicy"]

POLICY_FILE = "abstention_policy.json"
PREDICTED = "predicted"
"""The name of groups that are the predicted classes."""

Threshold = float
Group = str | int


@dataclass(frozen=True, kw_only=True)
class AbstentionPolicy:
    """Answer where the score is at least a threshold, refuse otherwise; made by `fit_abstention`.

    The promise: with probability at least ``confidence`` over the calibration rows, the share of wrong answers among
    those that are given is at most ``max_risk``, for inputs that are drawn as the calibration rows were. With groups
    it holds of each group by itself.

    Attributes:
        score: one of `SCORES`; another word for scores that were given as numbers.
        threshold: answers where score >= threshold; +inf: never, -inf: always. With groups: of none of them, +inf.
        max_risk: the largest share of wrong answers.
        confidence: the probability of the promise, for each group.
        num_examples: rows that it was calibrated on.
        coverage: the share of the calibration rows that it answers.
        feasible: whether it answers anything.
        model_risk: the share of calibration rows on which the model is wrong, if it answers all.
        smallest_refusal: max(0, (model_risk - max_risk) / (1 - max_risk)), the least share that any rule must refuse
            which ranks wrong answers last as perfectly as can be.
        groups: by group, its threshold; None without groups. An unknown group is refused.
        group_by: what the groups are: a column's name, or "predicted" for the predicted class.
        method: how the posterior predicted; None: its default.
        num_samples: draws of each prediction.
        posterior: the class of the posterior; None of scores that were given as numbers.
        weights: a digest of the model's weights; None of scores that were given as numbers.
        settings: what else decides its predictions (prior precision, temperature); None where nothing is known of it.

    Raises:
        ValueError: a field is out of its range.

    >>> policy = AbstentionPolicy(score="confidence", threshold=0.8, max_risk=0.05, confidence=0.9, num_examples=500,
    ...                           coverage=0.7, feasible=True, model_risk=0.1)
    >>> policy.abstain(torch.tensor([0.9, 0.8, 0.7, torch.nan]))
    tensor([False, False,  True,  True])
    """

    score: str
    threshold: Threshold
    max_risk: float
    confidence: float
    num_examples: int
    coverage: float
    feasible: bool
    model_risk: float
    smallest_refusal: float = 0.0
    groups: Mapping[Group, Threshold] | None = None
    group_by: str | None = None
    method: str | None = None
    num_samples: int | None = None
    posterior: str | None = None
    weights: str | None = None
    settings: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.score, str):
            raise ValueError(f"`score` must be a name, got {self.score!r}.")
        for name in ("max_risk", "confidence", "coverage", "model_risk", "smallest_refusal"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for group, value in [(None, self.threshold), *(self.groups or {}).items()]:
            if not is_real(value) or math.isnan(value):
                raise ValueError(
                    f"`threshold` {'' if group is None else f'of {group!r} '}must be a number, got {value!r}."
                )

    def abstain(
        self,
        predictive_or_scores: Predictive | Tensor | Sequence[float],
        groups: Sequence[Hashable] | Tensor | None = None,
    ) -> Tensor:
        """Return which inputs to refuse.

        Args:
            predictive_or_scores: a prediction, or numbers of this policy's score, higher for the surer.
            groups: each input's group, (B,), of a policy that has groups; a prediction says those of "predicted".

        Returns:
            Bool of the scores' shape, True: refuse. A NaN score, and an unknown group, are refused.

        Raises:
            TypeError: neither a prediction nor numbers.
            ValueError: a policy with groups without the inputs' groups, or as many groups as there are not scores.
        """
        if isinstance(predictive_or_scores, Predictive):
            scores = self._scores(predictive_or_scores)
            if groups is None and self.group_by == PREDICTED:
                groups = predictive_or_scores.mean_log_probs.argmax(-1)
        else:
            scores = _numbers(predictive_or_scores)
        values = scores.detach().double()  # a threshold lies between two floats, where float32 has no number
        if self.groups is None:
            return ~(values >= self.threshold)
        if groups is None:
            raise ValueError(
                f"`groups` must say each input's {self.group_by or 'group'}: the policy has a threshold per group."
            )
        names = _plain(groups)
        if len(names) != values.numel():
            raise ValueError(f"`groups` must have {values.numel()} entries, one per score, got {len(names)}.")
        limits = torch.tensor([self.groups.get(name, math.inf) for name in names], dtype=torch.float64)
        return ~(values >= limits.reshape(values.shape).to(values.device))

    def _scores(self, predictive: Predictive) -> Tensor:
        check_choice("score", self.score, tuple(sorted(SCORES)))
        return score_of(predictive, self.score)

    def describe(self) -> str:
        """Say in two sentences for people what it does, and what it promises."""
        promise = (
            f"With {self.confidence:.0%} confidence at most {self.max_risk:.2%} of the answers are wrong"
            f"{' in each group' if self.groups is not None else ''}, for inputs that are drawn as the "
            f"{self.num_examples} calibration rows were, of which the model without refusing gets "
            f"{self.model_risk:.1%} wrong."
        ).replace(".00%", "%")
        if not self.feasible:
            return (
                f"The model refuses every input: no threshold on {self.score!r} could be certified to leave at most "
                f"{self.max_risk:.2%} of the answers wrong with {self.confidence:.0%} confidence. "
                f"It was calibrated on {self.num_examples} rows, of which the model gets {self.model_risk:.1%} wrong."
            ).replace(".00%", "%")
        if self.groups is not None:
            rule = f"its {self.score} reaches the threshold of its {self.group_by or 'group'}"
        elif self.threshold == -math.inf:
            rule = f"its {self.score} is a number"
        else:
            rule = f"its {self.score} is at least {self.threshold:.4g}"
        return (
            f"The model answers an input if {rule}, about {self.coverage:.0%} of them, and refuses the rest. {promise}"
        )

    # -- persistence -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; infinite thresholds are the words "inf" and "-inf"."""
        found = asdict(self) | {"threshold": _written(self.threshold)}
        found["groups"] = None if self.groups is None else [[key, _written(t)] for key, t in self.groups.items()]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AbstentionPolicy:
        """Return what `to_dict` gave; names of newer versions are left out.

        Raises:
            ValueError: a field is missing or out of range.
        """
        known = {field.name for field in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        try:
            found["threshold"] = float(found["threshold"])
            if found.get("groups") is not None:
                found["groups"] = {key: float(value) for key, value in found["groups"]}
            return cls(**found)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`values` is no abstention policy: {error}") from error

    def save(self, directory: str | PathLike[str]) -> Path:
        """Write ``abstention_policy.json`` into a folder, or the file itself if the name ends in .json.

        Returns:
            The file's path.
        """
        return write_record(directory, POLICY_FILE, self.to_dict())

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> AbstentionPolicy:
        """Return what `save` wrote, given the folder or the file.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        return cls.from_dict(read_record(directory, POLICY_FILE))


def _numbers(scores: Any) -> Tensor:
    try:
        values = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`predictive_or_scores` must be a Predictive or numbers, got {type(scores).__name__}."
        ) from error
    return values


def _plain(groups: Any) -> list[Any]:
    """Groups as Python's own numbers and words, in one list."""
    if isinstance(groups, Tensor):
        return groups.flatten().tolist()
    flatten = getattr(groups, "ravel", None)
    return list(flatten().tolist()) if callable(flatten) else list(groups)


def _written(threshold: float) -> float | str:
    return float(threshold) if math.isfinite(threshold) else str(float(threshold))
