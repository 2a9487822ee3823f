"""The `evaluate` module "uncertainty": scores, calibration and uncertainties of probabilities or of draws.

`bayeformers.metrics.load("uncertainty")` and `evaluate.load(<path to this file>)` both give it. `evaluate` copies this
one file into its cache, so that everything it needs is imported absolutely, and the first class it finds here is used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np

from bayeformers import metrics
from bayeformers.metrics._checks import FloatArray, IntArray, float_array, probabilities, to_numpy

_DESCRIPTION = "Proper scores, calibration, selective prediction and uncertainty of a classifier's predictions."

_INPUTS = """
Args:
    predictions: probabilities (N, C), or those of S draws for each example (N, S, C); told apart by their shape.
    references: integer labels (N,) in [0, C).
    log_probs: the predictions are log-probabilities.
    num_bins, binning: of the calibration error, "width" or "mass".
    num_resamples: if > 0, every number gets a bootstrap interval, `<name>_low` and `<name>_high`.
    confidence_level, bootstrap_seed: of these intervals.
Returns: a dict of floats:
    accuracy, nll (nats), brier, ece and its ece_num_bins, aurc, error_auroc (NaN without both right and wrong answers),
    predictive_entropy (mean, nats); from draws also expected_entropy and mutual_information (means, nats).
"""


class Uncertainty(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
    """Accepts (N, C) or (N, S, C); see the input description for what it returns."""

    def _info(self) -> Any:
        label = datasets.Value("float64")  # an integer feature would truncate 0.5 to class 0 without a word
        rows = datasets.Sequence(datasets.Value("float64"))
        shapes = [rows, datasets.Sequence(rows)]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": shape, "references": label}) for shape in shapes],
        )

    def _infer_feature_from_batch(self, batch: dict[str, Any]) -> Any:
        if len(batch["predictions"]) == 0:
            raise ValueError("`predictions` is empty; at least one example is needed.")
        return super()._infer_feature_from_batch(batch)

    def _compute(
        self,
        *,
        predictions: Any,
        references: Any,
        log_probs: bool = False,
        num_bins: int = 15,
        binning: metrics.Binning = "width",
        num_resamples: int = 0,
        confidence_level: float = 0.95,
        bootstrap_seed: int = 0,
    ) -> dict[str, float]:
        probs, labels = _probabilities(predictions, log_probs), _labels(references)
        mean = probs.mean(1) if probs.ndim == 3 else probs
        results: dict[str, float] = {}
        for name, (metric, arrays) in _metrics(probs, mean, labels, num_bins, binning).items():
            results[name] = _value_or_nan(metric, arrays)
            if num_resamples > 0:
                low, high = _interval(
                    metric,
                    arrays,
                    num_resamples=num_resamples,
                    confidence_level=confidence_level,
                    seed=bootstrap_seed,
                )
                results |= {f"{name}_low": low, f"{name}_high": high}
        return results | {"ece_num_bins": num_bins}


def _metrics(
    probs: Any, mean: Any, labels: Any, num_bins: int, binning: metrics.Binning
) -> dict[str, tuple[Callable[..., float], tuple[Any, ...]]]:
    """Each reported name with its metric and the arrays that it takes, examples first."""
    ece = partial(metrics.expected_calibration_error, num_bins=num_bins, binning=binning)
    scores: dict[str, tuple[Callable[..., float], tuple[Any, ...]]] = {
        "accuracy": (metrics.accuracy, (mean, labels)),
        "nll": (metrics.negative_log_likelihood, (mean, labels)),
        "brier": (metrics.brier_score, (mean, labels)),
        "ece": (ece, (mean, labels)),
    }
    metrics.accuracy(mean, labels)  # checks the labels before an error is derived from them
    confidence, error = mean.max(1), mean.argmax(1) != labels
    scores["aurc"] = (metrics.aurc, (confidence, error))
    scores["error_auroc"] = (metrics.error_auroc, (confidence, error))
    with np.errstate(divide="ignore"):
        draws = np.log(probs.swapaxes(0, 1) if probs.ndim == 3 else probs[None])
    scores["predictive_entropy"] = (_mean, (metrics.predictive_entropy(draws),))
    if probs.ndim == 3:
        scores["expected_entropy"] = (_mean, (metrics.expected_entropy(draws),))
        scores["mutual_information"] = (_mean, (metrics.mutual_information(draws),))
    return scores


def _probabilities(predictions: Any, log_probs: bool) -> FloatArray:
    """The predictions as probabilities (N, C) or (N, S, C), each row of which is normalised."""
    values = to_numpy(predictions, "predictions")
    values = np.exp(values) if log_probs else values
    rows = values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values
    return probabilities(rows, "predictions").reshape(values.shape)


def _labels(references: Any) -> IntArray:
    values = float_array(references, "references", ndim=1)
    if (values != np.floor(values)).any():
        raise ValueError(f"`references` must be integer class indices, got {values[values != np.floor(values)][0]}.")
    return values.astype(np.int64)


def _mean(values: Any) -> float:
    return float(values.mean())


def _value_or_nan(metric: Callable[..., float], arrays: tuple[Any, ...]) -> float:
    try:
        return metric(*arrays)
    except metrics.UndefinedMetricError:
        return float("nan")


def _interval(metric: Callable[..., float], arrays: tuple[Any, ...], **settings: Any) -> tuple[float, float]:
    try:
        interval = metrics.bootstrap_ci(metric, *arrays, **settings)
    except metrics.UndefinedMetricError:
        return float("nan"), float("nan")
    return interval.low, interval.high
