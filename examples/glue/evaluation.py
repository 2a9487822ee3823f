"""Predictions of every method on every set, and the numbers that compare them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from bayeformers import BayesianTrainer
from bayeformers.metrics import fit_temperature
from bayeformers.reports import (
    ClassPredictions,
    RegressionPredictions,
    bootstrap_intervals,
    classification_report,
    majority_predictions,
    ood_report,
    regression_report,
)
from bayeformers.training import BayesianPredictionOutput
from examples.glue.data import GlueData

Predictions = ClassPredictions | RegressionPredictions
BySet = dict[str, Predictions]
"""A method's predictions on the sets "validation", "test" and, where there is one, "shifted"."""

ALL = "in-domain"
"""The whole test set, beside its groups."""


def predict_sets(trainer: BayesianTrainer, data: GlueData) -> BySet:
    """Predictions by the trainer's posterior, or by its point estimate, on every set but train."""
    sets = {"validation": data.validation, **data.reported}
    outputs = {name: trainer.predict(split) for name, split in sets.items()}
    has_posterior = trainer.posterior is not None
    if not data.task.is_regression:
        return {name: _classes(output, has_posterior) for name, output in outputs.items()}
    noise_std = None if has_posterior else training_rmse(trainer, data)
    return {name: _numbers(output, noise_std) for name, output in outputs.items()}


def _classes(output: BayesianPredictionOutput, has_posterior: bool) -> ClassPredictions:
    probs = np.exp(np.asarray(output.predictions, dtype=np.float64))
    epistemic = output.uncertainty["mutual_information"].astype(np.float64) if has_posterior else None
    return ClassPredictions(probs / probs.sum(1, keepdims=True), epistemic)


def _numbers(output: BayesianPredictionOutput, noise_std: float | None) -> RegressionPredictions:
    """``noise_std``: that of a point estimate, which has a mean only."""
    mean = np.asarray(output.predictions, dtype=np.float64).reshape(-1)
    if noise_std is not None:
        return RegressionPredictions(mean, np.full(mean.shape, noise_std**2))
    aleatoric, epistemic = (output.uncertainty[f"{name}_variance"] for name in ("aleatoric", "epistemic"))
    return RegressionPredictions(mean, aleatoric.astype(np.float64), epistemic.astype(np.float64))


def training_rmse(trainer: BayesianTrainer, data: GlueData) -> float:
    """Root mean square error of a regression on its training data: the noise that a point estimate implies."""
    predictions = np.asarray(trainer.predict(data.train).predictions, dtype=np.float64)
    residual = predictions.reshape(-1) - np.asarray(data.train["label"])
    return float(np.sqrt(np.mean(residual**2)))


@dataclass(frozen=True)
class Recalibrated:
    """A point estimate with one number fitted on the validation set: a temperature, or a regression's noise."""

    name: str
    value: float
    predictions: BySet


def recalibrate(predictions: BySet, validation: Dataset) -> Recalibrated:
    """Temperature scaling: softmax(logits / T) with the T of least validation NLL; in a regression the noise's std."""
    labels = np.asarray(validation["label"])
    held_out = predictions["validation"]
    if isinstance(held_out, RegressionPredictions):
        noise_std = float(np.sqrt(np.mean((held_out.mean - labels) ** 2)))
        fitted: BySet = {
            name: RegressionPredictions(value.mean, np.full(value.mean.shape, noise_std**2))
            for name, value in predictions.items()
        }
        return Recalibrated("fitted_noise", noise_std, fitted)
    temperature = fit_temperature(np.log(held_out.probs.clip(1e-300)), labels)
    scaled: BySet = {name: ClassPredictions(_tempered(value.probs, temperature)) for name, value in predictions.items()}
    return Recalibrated("temperature", temperature, scaled)


def _tempered(probs: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(log p / T): log-probabilities are logits up to a shift."""
    scaled = np.log(probs.clip(1e-300)) / temperature
    powers = np.exp(scaled - scaled.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


BASELINE = "majority class"
"""What one says without looking, beside the methods: the training labels' frequencies, or their mean and variance."""


def baseline(data: GlueData) -> BySet:
    """Of every set."""
    labels = np.asarray(data.train["label"])
    sizes = {name: len(split) for name, split in {"validation": data.validation, **data.reported}.items()}
    if data.task.is_regression:
        mean, variance = float(labels.mean()), float(labels.var())
        return {n: RegressionPredictions(np.full(size, mean), np.full(size, variance)) for n, size in sizes.items()}
    return {name: majority_predictions(labels, data.task.num_labels, size) for name, size in sizes.items()}


def group_masks(data: GlueData) -> dict[str, tuple[str, np.ndarray]]:
    """Group -> (set, mask of its rows): the whole test set, its groups if there are several, the shifted set."""
    names = np.asarray(data.test["group"])
    groups = list(dict.fromkeys(names.tolist()))
    masks = {ALL: ("test", np.ones(len(names), dtype=bool))}
    if len(groups) > 1:
        masks |= {group: ("test", names == group) for group in sorted(groups)}
    if data.shifted is not None:
        masks["shifted"] = ("shifted", np.ones(len(data.shifted), dtype=bool))
    return masks


def method_report(predictions: BySet, data: GlueData) -> dict[str, Any]:
    """Numbers of one method: ``groups`` (a report for each), ``intervals`` (of the main scores on whole sets, by the
    bootstrap over inputs) and, with a shifted set, ``ood_auroc`` by each score."""
    groups, intervals = {}, {}
    for group, (name, mask) in group_masks(data).items():
        split = data.reported[name]
        labels = np.asarray(split["label"])[mask] if "label" in split.column_names else None
        groups[group] = _group_report(predictions[name][mask], labels, data)
        if labels is not None and mask.all():
            intervals[group] = bootstrap_intervals(predictions[name], labels)
    report = {"groups": groups, "intervals": intervals}
    if data.shifted is None:
        return report
    return {**report, "ood_auroc": ood_report(predictions["test"], predictions["shifted"])}


def _group_report(predictions: Predictions, labels: np.ndarray | None, data: GlueData) -> dict[str, float | None]:
    if isinstance(predictions, RegressionPredictions):
        report, decisions = regression_report(predictions, labels), predictions.mean
    else:
        report, decisions = classification_report(predictions, labels), predictions.probs.argmax(1)
    official = {} if labels is None else data.task.compute_metrics(decisions, labels)
    official.pop("matthews_correlation", None)  # the report's "matthews"
    return {**official, **report}
