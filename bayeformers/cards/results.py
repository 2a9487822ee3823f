"""Metrics of an evaluation with their intervals, and the entries of a card's `model-index` that say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from huggingface_hub import EvalResult
from numpy.typing import NDArray

from ..checks import check_count
from ..metrics import BootstrapInterval, UndefinedMetricError, aurc, bootstrap_ci
from ..metrics.calibration import DEFAULT_BINS, bins_of

__all__ = ["evaluation_intervals", "evaluation_results"]

Metrics = Mapping[str, float | BootstrapInterval]

_NUMBERS = 2e7
"""Numbers that all resamples read together: 1,000 resamples of 20,000 items, fewer of more."""
_UNKNOWN = "unknown"


def evaluation_intervals(
    columns: Mapping[str, NDArray[Any]], *, num_resamples: int | None = None, seed: int = 0
) -> dict[str, BootstrapInterval]:
    """Return the metrics of an evaluation's items with 95 % percentile intervals of the bootstrap (Efron 1979).

    The numbers are those that `BayesianTrainer.evaluate` reports, and the accuracy: nll, ece, brier and aurc of
    classes, nll and rmse of a regression. Items are resampled one by one, which is right where they are independent:
    examples, and not the tokens of a text.

    Args:
        columns: per item, (n,): "nll", "squared_error"; and of classes "probs", (n, C), with "labels", (n,).
        num_resamples: how many resamples, >= 1; None: 1,000, fewer of more than 20,000 items.
        seed: of the resamples.

    Returns:
        Intervals by name; none of a metric that has no value.

    >>> probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    >>> found = evaluation_intervals({"probs": probs, "labels": np.array([0, 1, 1, 1])}, num_resamples=100)
    >>> found["accuracy"].estimate, found["accuracy"].low, found["accuracy"].high
    (0.75, 0.25, 1.0)
    """
    metrics = _metrics_of(columns)
    num_items = max((len(arrays[0]) for _, arrays in metrics.values()), default=0)
    if num_resamples is None:
        num_resamples = int(np.clip(_NUMBERS // max(num_items, 1), 100, 1000))
    check_count("num_resamples", num_resamples, 1)
    found = {}
    for name, (metric, arrays) in metrics.items():
        try:
            found[name] = bootstrap_ci(metric, *arrays, num_resamples=num_resamples, seed=seed)
        except UndefinedMetricError:
            continue
    return found


def _metrics_of(columns: Mapping[str, NDArray[Any]]) -> dict[str, tuple[Callable[..., float], tuple[Any, ...]]]:
    """By name, a function of one number per item and these numbers: resampling reads no matrix."""
    found: dict[str, tuple[Callable[..., float], tuple[Any, ...]]] = {}
    if len(columns.get("nll", ())):
        found["nll"] = (_mean, (columns["nll"].astype(np.float64).ravel(),))
    if len(columns.get("squared_error", ())):
        found["rmse"] = (lambda error: math.sqrt(error.mean()), (columns["squared_error"].astype(np.float64).ravel(),))
    if "probs" not in columns or not len(columns.get("labels", ())):
        return found
    probs, labels = columns["probs"].astype(np.float64), columns["labels"].ravel().astype(np.int64)
    probs = probs.reshape(len(labels), -1)
    probs = probs / probs.sum(1, keepdims=True)
    correct, confidence = probs.argmax(1) == labels, probs.max(1)
    squared = np.square(probs).sum(1) - 2 * probs[np.arange(len(labels)), labels] + 1
    return found | {
        "accuracy": (_mean, (correct.astype(np.float64),)),
        "ece": (lambda p, hit: bins_of(p, hit, DEFAULT_BINS, "width").expected_error, (confidence, correct)),
        "brier": (_mean, (squared,)),
        "aurc": (aurc, (confidence, (~correct).astype(np.float64))),
    }


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean())


def evaluation_results(metrics: Metrics, task: str, dataset: str | None, dataset_id: str | None) -> list[EvalResult]:
    """Return the entries of `model-index`, an interval among a metric's ``args``; a number that is not finite has none.

    Args:
        metrics: by name, a number or an interval.
        task: such as "text-classification".
        dataset: its name for readers; None: unknown.
        dataset_id: its name on the hub; None: unknown.
    """
    found = []
    for name, value in metrics.items():
        estimate = float(value.estimate if isinstance(value, BootstrapInterval) else value)
        if math.isfinite(estimate):
            found.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset_id or _UNKNOWN,
                    dataset_name=dataset or dataset_id or _UNKNOWN,
                    metric_type=name,
                    metric_name=name,
                    metric_value=estimate,
                    metric_args=_interval(value) if isinstance(value, BootstrapInterval) else None,
                )
            )
    return found


def _interval(value: BootstrapInterval) -> dict[str, Any]:
    return {
        "confidence_level": value.confidence_level,
        "low": value.low,
        "high": value.high,
        "bootstrap_resamples": value.num_resamples,
    }
