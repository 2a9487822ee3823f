"""Scores of a prediction, higher for the less familiar; each is one number per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from ..forward import Inputs
from ..likelihoods import get_likelihood, ignored_label
from ..posteriors import Posterior
from ..posteriors.heads import known_problem_type
from ..predictive import Predictive

PredictionMethod = Literal["max_probability", "entropy", "mutual_information", "max_logit", "energy", "logit_variance"]
PREDICTIONS: tuple[str, ...] = get_args(PredictionMethod)

_SCORES: dict[str, Callable[[Predictive], Tensor]] = {
    "max_probability": lambda predictive: -predictive.mean_log_probs.amax(-1).exp(),
    "entropy": lambda predictive: predictive.predictive_entropy,
    "mutual_information": lambda predictive: predictive.mutual_information,
    "max_logit": lambda predictive: predictive.max_logit,
    "energy": lambda predictive: predictive.energy,
    "logit_variance": lambda predictive: predictive.logit_variance,
}


def prediction_score(method: str, predictive: Predictive) -> Tensor:
    """Return one score of a prediction per example.

    Args:
        method: one of `PREDICTIONS`; all but the two variances need classes.
        predictive: the prediction; scores of tokens (of those that the mask admits), labels and outputs are averaged.

    Returns:
        (B,), higher for the less familiar.

    >>> import torch
    >>> sure = torch.tensor([[[0.99, 0.01], [0.6, 0.4]]]).log()
    >>> predictive = Predictive(problem_type="single_label_classification", log_probs=sure)
    >>> prediction_score("max_probability", predictive)
    tensor([-0.9900, -0.6000])
    """
    values = _SCORES[method](predictive)
    if values.dim() == 1:
        return values
    if predictive.mask is None or predictive.mask.shape != values.shape:
        return values.flatten(1).mean(1)
    return values.masked_fill(~predictive.mask, 0).sum(1) / predictive.mask.sum(1).clamp_min(1)


def point_prediction(posterior: Posterior, output: Any, inputs: Inputs) -> Predictive:
    """Return what one output of the model says, as a prediction of one draw."""
    problem = known_problem_type(posterior.model)
    likelihood = get_likelihood(problem)
    values = likelihood.values(output, inputs)
    if likelihood.has_noise:
        return Predictive(problem_type=problem, values=values[None])
    normalizers = likelihood.log_normalizers(output, values)
    return Predictive(
        problem_type=problem,
        log_probs=values[None],
        mask=likelihood.attended(values, inputs),
        ignored_label=ignored_label(posterior.model, problem),
        log_normalizers=None if normalizers is None else normalizers[None],
    )
