"""`score_ood`: one number per input that is higher for the less familiar, by one name."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..checks import check_choice
from ..forward import Inputs
from ..posteriors import PointPosterior, Posterior
from ..posteriors.predict import as_posterior
from .density import FeatureDensity
from .predictions import PREDICTIONS, PredictionMethod, prediction_score

ScoreMethod = Literal["auto", "density"] | PredictionMethod
_METHODS: tuple[str, ...] = ("auto", "density", *PREDICTIONS)
_OF_DRAWS = ("mutual_information", "logit_variance")


def score_ood(
    model_or_posterior: nn.Module | Posterior,
    inputs: Inputs,
    *,
    method: ScoreMethod = "auto",
    density: FeatureDensity | None = None,
    num_samples: int = 16,
    seed: int = 0,
) -> Tensor:
    """Score how unfamiliar inputs are.

    Args:
        model_or_posterior: as `predict` takes it.
        inputs: what the model's forward takes; labels are ignored.
        method: "density": by features; "max_probability" (its negative), "entropy", "mutual_information", "max_logit"
            (its negative), "energy" or "logit_variance" of the posterior's prediction; "auto": the density where one is
            given, else the largest probability.
        density: of `fit_density`, for the first of these.
        num_samples: draws of a prediction, where the posterior has draws.
        seed: of the draws.

    Returns:
        (B,), higher for the less familiar; scores of tokens, labels and outputs are averaged.

    Raises:
        TypeError: the density is none.
        ValueError: the method is unknown, there is no density for it, or no posterior for a disagreement of draws.

    >>> import torch
    >>> score_ood(nn.Linear(2, 3), torch.ones(5, 2), method="energy").shape
    torch.Size([5])
    """
    check_choice("method", method, _METHODS)
    if density is not None and not isinstance(density, FeatureDensity):
        raise TypeError(f"`density` must be a FeatureDensity (see `fit_density`), got {type(density).__name__}.")
    if method == "density" and density is None:
        raise ValueError("`method`='density' needs a `density`: fit one by `fit_density`.")
    if density is not None and method in ("auto", "density"):
        return density.score(model_or_posterior, inputs)
    name = "max_probability" if method == "auto" else method
    posterior = as_posterior(model_or_posterior)
    if isinstance(posterior, PointPosterior) and name in _OF_DRAWS:
        raise ValueError(
            f"`method`={name!r} is how far draws of the weights differ, and this {type(posterior.model).__name__} is a "
            'point estimate, for which it is 0 everywhere: give a posterior, or take "energy" or a density.'
        )
    predictive = posterior.predict(inputs, num_samples=num_samples, seed=seed)
    return prediction_score(name, predictive)
