"""Predictions of every method, their scores, and what each method's parameters and files really weigh."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from scipy.special import softmax
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from bayeformers import BayesianTrainer, posterior_mean
from bayeformers.metrics import fit_temperature
from bayeformers.reports import ClassPredictions, classification_report
from examples.images.data import ImageData, Images

SCORES = ("accuracy", "nll", "ece", "brier", "aurc", "entropy", "aleatoric", "epistemic")


@dataclass(frozen=True)
class BySet:
    """A method's predictions on the validation and on the test images, and the seconds of the latter."""

    validation: ClassPredictions
    test: ClassPredictions
    seconds: float


def predict_sets(trainer: BayesianTrainer, data: ImageData) -> BySet:
    """By the trainer's posterior, or by its point estimate."""
    validation = predicted(trainer, data.validation)
    start = time.perf_counter()
    test = predicted(trainer, data.test)
    return BySet(validation, test, time.perf_counter() - start)


def predicted(trainer: BayesianTrainer, split: Dataset[dict[str, Any]]) -> ClassPredictions:
    """Probabilities averaged over draws, with the mutual information of a posterior."""
    output = trainer.predict(split)
    epistemic = None
    if trainer.posterior is not None:
        epistemic = output.uncertainty["mutual_information"].astype(np.float64)
    return ClassPredictions(_probs(np.asarray(output.predictions)), epistemic)


@torch.no_grad()
def predicted_by_mean(trainer: BayesianTrainer, split: Images) -> ClassPredictions:
    """By the network at the posterior's mean, without noise."""
    loader = DataLoader(split, trainer.args.per_device_eval_batch_size, collate_fn=default_data_collator)
    model, device = trainer.model.to(trainer.args.device).eval(), trainer.args.device
    with posterior_mean(model):
        logits = [model(pixel_values=batch["pixel_values"].to(device)).logits for batch in loader]
    return ClassPredictions(_probs(torch.cat(logits).double().log_softmax(-1).cpu().numpy()))


def tempered(point: BySet, data: ImageData) -> tuple[float, BySet]:
    """(T, predictions by softmax(logits / T)), with the T of least validation NLL."""
    temperature = fit_temperature(np.log(point.validation.probs.clip(1e-300)), data.validation.labels.numpy())

    def scaled(predictions: ClassPredictions) -> ClassPredictions:
        return ClassPredictions(_probs(np.log(predictions.probs.clip(1e-300)) / temperature))

    return temperature, BySet(scaled(point.validation), scaled(point.test), point.seconds)


def _probs(log_probs: np.ndarray) -> np.ndarray:
    """Normalised in float64: log-probabilities are logits up to a shift."""
    probs: np.ndarray = softmax(log_probs.astype(np.float64), axis=1)
    return probs


def scores(predictions: ClassPredictions, split: Images) -> dict[str, float | None]:
    """The columns of every table."""
    report = classification_report(predictions, split.labels.numpy())
    return {name: report[name] for name in SCORES}


@dataclass(frozen=True)
class Sizes:
    """What a method keeps, counted from its tensors and its files.

    Attributes:
        weights: parameters of the network; of a Bayesian one, the means.
        scales: parameters that set the standard deviations.
        other: further numbers in the files: a prior's centres, curvature, running statistics.
        bytes: of the safetensors files.
    """

    weights: int
    scales: int
    other: int
    bytes: int


def sizes(trainer: BayesianTrainer, folder: Path) -> Sizes:
    """Of the trainer's model, which was saved to `folder`."""
    counts = {name: parameter.numel() for name, parameter in trainer.model.named_parameters()}
    scales = sum(count for name, count in counts.items() if name.endswith("_rho"))
    weights = sum(counts.values()) - scales
    files = sorted(folder.glob("*.safetensors"))
    stored = sum(count for file in files for count in _stored(file))
    return Sizes(weights, scales, stored - weights - scales, sum(file.stat().st_size for file in files))


def _stored(file: Path) -> Iterator[int]:
    """Numbers of each tensor in a safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            yield int(np.prod(tensors.get_slice(name).get_shape()))
