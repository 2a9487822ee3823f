"""Predictions of classes and their labels as the conformal scores take them: (n, C) and (n,), or (n, L) of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..likelihoods import IGNORED, get_likelihood
from ..predictive import Predictive

__all__ = ["MULTI_LABEL", "SINGLE_LABEL", "ClassRows", "device_of", "log_probs_of"]

SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"

_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Labelled predictions.

    Attributes:
        log_probs: (n, C) in float64 on the CPU; of labels (n, L), of their presence.
        labels: (n,) int64, -100 where there is none; of labels (n, L) bool.
        problem_type: of the head.
    """

    log_probs: Tensor
    labels: Tensor
    problem_type: str

    @classmethod
    def of(cls, parts: Sequence[tuple[Any, Any]]) -> ClassRows:
        """Join batches of predictions, or probabilities, with their labels.

        Args:
            parts: pairs of a `Predictive` or probabilities, and labels.

        Returns:
            All rows.

        Raises:
            ValueError: predictions of another kind, or labels of another shape or out of range.
        """
        found, labels, problem_type = [], [], SINGLE_LABEL
        for prediction, own in parts:
            wanted = torch.as_tensor(own).detach().cpu()
            log_probs, problem_type = log_probs_of(prediction, MULTI_LABEL if wanted.dim() == 2 else SINGLE_LABEL)
            found.append(log_probs)
            labels.append(_checked_labels(wanted, log_probs, problem_type))
        return cls(torch.cat(found), torch.cat(labels), problem_type)

    @property
    def is_multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.problem_type == MULTI_LABEL

    @property
    def num_classes(self) -> int:
        """C, or L."""
        return self.log_probs.shape[1]

    def labelled(self) -> Tensor:
        """Which rows have a label, (n,) bool."""
        if self.is_multi_label:
            return torch.ones(len(self.labels), dtype=torch.bool)
        return self.labels != IGNORED

    def at(self, rows: Tensor) -> ClassRows:
        """Some of the rows, by number or mask."""
        return ClassRows(self.log_probs[rows], self.labels[rows], self.problem_type)


def log_probs_of(prediction: Any, problem_type: str) -> tuple[Tensor, str]:
    """Return log-probabilities of the classes in float64, and the problem type.

    Args:
        prediction: a `Predictive`, or probabilities (B, C) as a tensor or array.
        problem_type: of probabilities, which do not say it.

    Returns:
        (B, C), of several labels (B, L) of their presence, on the CPU.

    Raises:
        ValueError: a prediction of something else than one class or one set of labels per input.
    """
    if isinstance(prediction, Predictive):
        likelihood = get_likelihood(prediction.problem_type)
        if likelihood.has_noise:
            raise ValueError("A regression has intervals, not sets of classes: see `fit_prediction_intervals`.")
        log_probs = prediction.mean_log_probs.detach().to("cpu", torch.float64)
        log_probs = log_probs[..., 1] if likelihood.is_bernoulli else log_probs
        if log_probs.dim() != 2:
            raise ValueError(
                f"Prediction sets are for one decision per input, got a {prediction.problem_type!r} head, whose "
                f"predictions have the shape {tuple(log_probs.shape)}: those of one input are not exchangeable with "
                "each other. Give the probabilities (n, C) of one position per input."
            )
        return log_probs, prediction.problem_type
    try:
        probs = torch.as_tensor(prediction).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`predictive_or_probs` must be a Predictive or probabilities (B, C), got {type(prediction).__name__}."
        ) from error
    _check_probs(probs, problem_type)
    return probs.log(), problem_type


def device_of(prediction: Any) -> torch.device:
    """Where a prediction lies; arrays lie on the CPU."""
    if isinstance(prediction, Predictive) and prediction.log_probs is not None:
        return prediction.log_probs.device
    return prediction.device if isinstance(prediction, Tensor) else torch.device("cpu")


def _check_probs(probs: Tensor, problem_type: str) -> None:
    if probs.dim() != 2 or probs.shape[1] < 1:
        raise ValueError(f"Probabilities must have the shape (B, C), got {tuple(probs.shape)}.")
    if not bool(((probs >= 0) & (probs <= 1 + _SUM_TOLERANCE)).all()):
        raise ValueError(
            f"Probabilities must lie in [0, 1], got {float(probs.min()):.4g} to {float(probs.max()):.4g}: logits go "
            "through a softmax first (of several labels a sigmoid), log-probabilities through an exponential."
        )
    if problem_type != MULTI_LABEL and len(probs) and float((probs.sum(1) - 1).abs().max()) > _SUM_TOLERANCE:
        worst = probs.sum(1)[(probs.sum(1) - 1).abs().argmax()]
        raise ValueError(f"Probabilities must sum to 1 over the classes, got {float(worst):.4g}.")


def _checked_labels(labels: Tensor, log_probs: Tensor, problem_type: str) -> Tensor:
    if problem_type == MULTI_LABEL:
        if labels.shape != log_probs.shape:
            raise ValueError(f"`labels` must have the shape {tuple(log_probs.shape)}, got {tuple(labels.shape)}.")
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError("`labels` of several per row must be 0 or 1, all of them known.")
        return labels.bool()
    if labels.shape == (len(log_probs), 1):
        labels = labels[:, 0]
    if labels.shape != log_probs.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"`labels` must be whole numbers, ({len(log_probs)},), got {labels.dtype} of the shape "
            f"{tuple(labels.shape)}."
        )
    labels = labels.long()
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= log_probs.shape[1]))]
    if len(wrong):
        raise ValueError(f"`labels` must be classes 0..{log_probs.shape[1] - 1} or {IGNORED}, got {int(wrong[0])}.")
    return labels
