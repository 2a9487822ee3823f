"""A point estimate with one number fitted on held-out rows: the baseline that every posterior has to face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..metrics import fit_temperature
from .report import ClassPredictions, RegressionPredictions


@dataclass(frozen=True)
class Recalibrated:
    """Predictions by set after the fit of a ``temperature``, or of a regression's ``fitted_noise``; and its value."""

    name: str
    value: float
    predictions: dict[str, Any]


def recalibrate(predictions: Mapping[str, Any], labels: ArrayLike, *, by: str = "validation") -> Recalibrated:
    """Return softmax(logits / T) with the T of least NLL on one set; of a regression, the noise's standard deviation.

    Args:
        predictions: of a point estimate, by set.
        labels: of the set that chooses, (N,).
        by: that set's name.

    >>> point = {"validation": ClassPredictions(np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1]]))}
    >>> found = recalibrate(point, [0, 1, 0, 1])
    >>> print(found.name, found.predictions["validation"].probs[0].round(2))
    temperature [0.75 0.25]
    """
    truth, held_out = np.asarray(labels), predictions[by]
    if isinstance(held_out, RegressionPredictions):
        std = float(np.sqrt(np.mean((held_out.mean - truth) ** 2)))
        means = {name: value.mean for name, value in predictions.items()}
        fitted = {name: RegressionPredictions(mean, np.full(mean.shape, std**2)) for name, mean in means.items()}
        return Recalibrated("fitted_noise", std, fitted)
    temperature = fit_temperature(np.log(held_out.probs.clip(1e-300)), truth)
    scaled = {name: ClassPredictions(tempered(value.probs, temperature)) for name, value in predictions.items()}
    return Recalibrated("temperature", temperature, scaled)


def tempered(probs: NDArray[Any], temperature: float) -> NDArray[Any]:
    """softmax(log p / T) over the last axis: log-probabilities are logits up to a shift."""
    scaled = np.log(probs.clip(1e-300)) / temperature
    powers = np.exp(scaled - scaled.max(-1, keepdims=True))
    divided: NDArray[Any] = powers / powers.sum(-1, keepdims=True)
    return divided
