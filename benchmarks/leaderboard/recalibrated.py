"""Methods that are made of other methods' predictions: a temperature on top of one, the mean of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bayeformers import metrics
from benchmarks.real_data.context import Arrays, Context, Predictor
from benchmarks.real_data.data import labels

TINY = 1e-30


def recalibrated(context: Context, *, base: str) -> tuple[Predictor, dict[str, Any]]:
    """The probabilities of ``base`` to the power 1 / T, normalised; T by the held-out NLL."""
    value = metrics.fit_temperature(_log_probs(context.saved(base, "held_out")), labels(context.held_out))

    def predict(part: str) -> Arrays:
        return {"probs": softmax(_log_probs(context.saved(base, part)) / value)}

    return predict, {"temperature": value, "reads": [base]}


def averaged(context: Context, *, bases: Sequence[str]) -> tuple[Predictor, dict[str, Any]]:
    """The mixture of other methods of the same checkpoint, of equal weights."""

    def predict(part: str) -> Arrays:
        return {"probs": np.mean([context.saved(base, part)["probs"] for base in bases], axis=0)}

    return predict, {"reads": list(bases)}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _log_probs(arrays: Arrays) -> np.ndarray:
    return np.log(arrays["probs"].clip(TINY))
