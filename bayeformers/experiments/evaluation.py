"""Predictions of a trainer on several sets, as reports take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..reports import ClassPredictions, RegressionPredictions
from ..training import BayesianPredictionOutput, BayesianTrainer


def predict_sets(
    trainer: BayesianTrainer, sets: Mapping[str, Any], *, noise_std: float | None = None
) -> dict[str, Any]:
    """Return by set `ClassPredictions` or `RegressionPredictions` of the trainer's posterior, or point estimate.

    Args:
        trainer: of a classifier, or of a regression with one output.
        sets: datasets by name.
        noise_std: of a point estimate of a regression; by default its `training_rmse`.
    """
    outputs = {name: trainer.predict(rows) for name, rows in sets.items()}
    has_posterior = trainer.posterior is not None
    if not is_regression(trainer.model):
        return {name: _classes(output, has_posterior) for name, output in outputs.items()}
    if not has_posterior and noise_std is None:
        noise_std = training_rmse(trainer)
    return {name: _numbers(output, None if has_posterior else noise_std) for name, output in outputs.items()}


def _classes(output: BayesianPredictionOutput, has_posterior: bool) -> ClassPredictions:
    probs = np.exp(np.asarray(output.predictions, dtype=np.float64))
    epistemic = output.uncertainty["mutual_information"].astype(np.float64) if has_posterior else None
    return ClassPredictions(probs / probs.sum(1, keepdims=True), epistemic)


def _numbers(output: BayesianPredictionOutput, noise_std: float | None) -> RegressionPredictions:
    mean = np.asarray(output.predictions, dtype=np.float64).reshape(-1)
    if noise_std is not None:  # of a point estimate, which has a mean only
        return RegressionPredictions(mean, np.full(mean.shape, noise_std**2))
    aleatoric, epistemic = (output.uncertainty[f"{name}_variance"] for name in ("aleatoric", "epistemic"))
    return RegressionPredictions(mean, aleatoric.astype(np.float64), epistemic.astype(np.float64))


def is_regression(model: Any) -> bool:
    """Whether the model's configuration says so."""
    return getattr(getattr(model, "config", None), "problem_type", None) == "regression"


def training_rmse(trainer: BayesianTrainer) -> float:
    """Root mean square error of a regression on its training rows: the noise that a point estimate implies."""
    rows: Any = trainer.train_dataset
    predictions = np.asarray(trainer.predict(rows).predictions, dtype=np.float64)
    return float(np.sqrt(np.mean((predictions.reshape(-1) - np.asarray(rows["label"])) ** 2)))
