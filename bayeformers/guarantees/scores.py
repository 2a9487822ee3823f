"""Scores by which answers are ranked, all of them higher for the surer, and what counts as a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..likelihoods import IGNORED, get_likelihood
from ..predictive import Predictive

__all__ = ["SCORES", "ScoreName", "errors_of", "score_of"]

ScoreName = Literal[
    "confidence", "margin", "entropy", "mutual_information", "expected_entropy", "epistemic_std", "predictive_std"
]

_CLASSES: dict[str, Callable[[Predictive], Tensor]] = {
    "confidence": lambda predictive: predictive.mean_log_probs.amax(-1),
    "margin": lambda predictive: _margin(predictive),
    "entropy": lambda predictive: -predictive.predictive_entropy,
    "mutual_information": lambda predictive: -predictive.mutual_information,
    "expected_entropy": lambda predictive: -predictive.expected_entropy,
}
_VALUES: dict[str, Callable[[Predictive], Tensor]] = {
    "epistemic_std": lambda predictive: -predictive.epistemic_variance.sqrt(),
    "predictive_std": lambda predictive: -(predictive.epistemic_variance + predictive.aleatoric_variance).sqrt(),
}

SCORES: frozenset[str] = frozenset(get_args(ScoreName))
"""The names that `score_of` takes. The last two are a regression's; all others need classes."""


def score_of(predictive: Predictive, name: str = "confidence") -> Tensor:
    """Return how sure a prediction is, always higher for the surer: uncertainties are negated.

    An example with several answers that must all be right (the labels of a multi-label head, the start and end of a
    span, several outputs) gets one number: "confidence" is the product of theirs, entropies and information add up,
    "margin" and the deviations are the least sure one's. Tokens and pixels are scored each by itself.

    Args:
        predictive: the prediction.
        name: "confidence": the largest averaged probability; "margin": how far it is above the second; "entropy",
            "mutual_information", "expected_entropy": minus these, in nats; "epistemic_std", "predictive_std": minus a
            regression's standard deviations, in the labels' unit.

    Returns:
        (B,), or (B, T) and (B, H, W) of tokens and pixels, NaN at positions that the mask excludes.

    Raises:
        TypeError: no predictive.
        ValueError: the name is unknown, or not for such a head; a regression's noise is not known.

    >>> sure = torch.tensor([[[0.99, 0.01], [0.6, 0.4]]]).log()
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=sure)
    >>> score_of(predictive, "confidence"), score_of(predictive, "margin")
    (tensor([0.9900, 0.6000]), tensor([0.9800, 0.2000]))
    """
    check_choice("score", name, get_args(ScoreName))
    if not isinstance(predictive, Predictive):
        raise TypeError(f"`predictive` must be a Predictive, as `predict` gives it, got {type(predictive).__name__}.")
    likelihood = get_likelihood(predictive.problem_type)
    table = _VALUES if likelihood.has_noise else _CLASSES
    if name not in table:
        raise ValueError(f"`score` of a {predictive.problem_type!r} head must be one of {tuple(table)}, got {name!r}.")
    values = table[name](predictive)
    is_free = likelihood.is_per_token or likelihood.is_per_pixel
    if not is_free:
        values = values.reshape(len(values), -1)
        is_least = name in ("margin", *_VALUES)
        values = values.amin(1) if is_least else values.sum(1)  # logarithms of probabilities add up
    values = values.exp() if name == "confidence" else values
    if predictive.mask is not None and predictive.mask.shape == values.shape:
        values = values.masked_fill(~predictive.mask, torch.nan)
    return values


def _margin(predictive: Predictive) -> Tensor:
    largest = predictive.probs.topk(min(2, predictive.probs.shape[-1]), dim=-1).values
    return largest[..., 0] - largest[..., 1] if largest.shape[-1] > 1 else largest[..., 0]


def errors_of(predictive: Predictive, labels: Tensor | Mapping[str, Any], tolerance: float | None = None) -> Tensor:
    """Return which answers are wrong: 1, 0, or NaN where no label counts.

    An answer is the class of the largest averaged probability. A multi-label example is wrong where any of its labels
    is; a span where its start or its end is; a value where it is further from its label than ``tolerance``.

    Args:
        predictive: the prediction of a batch.
        labels: as the model's loss takes them; or the batch, with `labels` or `start_positions` and `end_positions`.
        tolerance: of a regression, in the labels' unit, >= 0.

    Returns:
        (B,), or (B, T) and (B, H, W) of tokens and pixels, in float64.

    Raises:
        ValueError: a regression without a tolerance, another head with one, or labels of another shape.

    >>> probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4]]])
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=probs.log())
    >>> errors_of(predictive, torch.tensor([0, 1]))
    tensor([0., 1.], dtype=torch.float64)
    """
    likelihood = get_likelihood(predictive.problem_type)
    if likelihood.has_noise:
        return _too_far(predictive, _found(labels, likelihood.label_names), tolerance)
    if tolerance is not None:
        raise ValueError(f"`tolerance` is a regression's, got {tolerance!r} for a {predictive.problem_type!r} head.")
    classes = likelihood.class_numbers(_found(labels, likelihood.label_names))
    log_probs = predictive.mean_log_probs
    if likelihood.is_per_pixel and classes.dim() == 3 and classes.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"`labels` of pixels must have the prediction's size {tuple(log_probs.shape[1:-1])}, got "
            f"{tuple(classes.shape[1:])}: take `predictive.resized` first."
        )
    if classes.shape != log_probs.shape[:-1]:
        raise ValueError(f"`labels` must have shape {tuple(log_probs.shape[:-1])}, got {tuple(classes.shape)}.")
    ignored = (classes == IGNORED) | (classes == predictive.ignored_label)
    ignored = ignored | likelihood.outside(classes, log_probs.shape[-1])
    if predictive.mask is not None and predictive.mask.shape == ignored.shape:
        ignored = ignored | ~predictive.mask
    wrong = (log_probs.argmax(-1) != classes).double()
    if likelihood.is_per_token or likelihood.is_per_pixel:
        return wrong.masked_fill(ignored, torch.nan)
    return _any(wrong.reshape(len(wrong), -1), ignored.reshape(len(wrong), -1))


def _any(wrong: Tensor, ignored: Tensor) -> Tensor:
    """Whether one of an example's answers is wrong, (B, K) -> (B,); NaN where none counts."""
    return wrong.masked_fill(ignored, 0).amax(1).masked_fill(ignored.all(1), torch.nan)


def _too_far(predictive: Predictive, labels: Tensor, tolerance: float | None) -> Tensor:
    if tolerance is None:
        raise ValueError(
            "`tolerance` must be given for a regression: a value is wrong where it is further than that from its "
            "label. Or give `errors` of your own."
        )
    check_number("tolerance", tolerance, 0.0)
    if labels.numel() != predictive.mean.numel():
        raise ValueError(f"`labels` must have shape {tuple(predictive.mean.shape)}, got {tuple(labels.shape)}.")
    distance = (predictive.mean - labels.reshape(predictive.mean.shape).to(predictive.mean)).abs()
    return (distance.reshape(len(distance), -1) > tolerance).any(1).double()


def _found(labels: Tensor | Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    found = [labels.get(name) for name in names]
    if names[0] == "labels":
        found = [found[0]]
    if not all(isinstance(value, Tensor) for value in found):
        raise ValueError(f"`labels`: every batch needs {list(names)} as tensors, got {sorted(labels)}.")
    if len(found) == 1:
        return found[0]  # type: ignore[return-value]
    return torch.stack([value.reshape(-1) for value in found], dim=1)  # type: ignore[union-attr]
