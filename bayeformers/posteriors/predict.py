"""`predict`: one call from a model to its prediction with uncertainties."""

from __future__ import annotations

import logging

from torch import nn

from ..forward import Inputs
from ..likelihoods import NoiseStd, ProblemType
from ..linearized.links import Link
from ..predictive import Predictive
from .base import BasePosterior, Posterior
from .files import check_model
from .point import PointPosterior
from .variational import VariationalPosterior, is_bayesian

logger = logging.getLogger(__name__)


def predict(
    model_or_posterior: nn.Module | Posterior,
    inputs: Inputs,
    *,
    num_samples: int = 16,
    method: str | None = None,
    link: Link = "auto",
    seed: int = 0,
    problem_type: ProblemType | None = None,
    noise_std: NoiseStd | None = None,
) -> Predictive:
    """Predict with uncertainties.

    Args:
        model_or_posterior: a posterior; a converted model; a model with a ``posterior`` attribute; or any other model,
            which is taken as a point estimate (one draw, no epistemic uncertainty). For many batches make the posterior
            once: it keeps what the batches share.
        inputs: what the model's ``forward`` takes: a mapping of names to arguments, one tensor, or a tuple or list of
            several; labels are ignored.
        num_samples: number S of draws; a posterior with fewer distinct draws gives those.
        method: "sample": average the network's probabilities over draws; "glm": the linearised network's, whose logits
            are Gaussian; and others, see `BasePosterior.predict`. By default the posterior's own: "glm" of a Laplace
            posterior, else "sample".
        link: from Gaussian logits to probabilities, of the linearised methods.
        seed: the same seed gives the same draws.
        problem_type: what the head predicts; by default found from the model's class and configuration.
        noise_std: a regression's noise, or "head" of a model that predicts it; by default as the configuration records.

    Returns:
        The prediction; TypeError or ValueError for an argument that is not one of these.

    >>> import torch
    >>> from bayeformers import to_bayesian
    >>> predictive = predict(to_bayesian(nn.Linear(4, 3)), torch.ones(2, 4), num_samples=8)
    >>> predictive.mean_log_probs.shape
    torch.Size([2, 3])
    """
    posterior = as_posterior(model_or_posterior)
    options = {"problem_type": problem_type, "noise_std": noise_std, "link": None if link == "auto" else link}
    given = {name: value for name, value in options.items() if value is not None}
    return posterior.predict(inputs, num_samples=num_samples, method=method, seed=seed, **given)


def as_posterior(model_or_posterior: nn.Module | Posterior) -> Posterior:
    """A posterior as it is; a model's own posterior; else its variational layers; else the point estimate."""
    if not isinstance(model_or_posterior, nn.Module):
        if isinstance(model_or_posterior, Posterior):
            return model_or_posterior
        raise TypeError(
            f"`model_or_posterior` must be a torch.nn.Module or a Posterior, got {type(model_or_posterior).__name__}."
        )
    own = getattr(model_or_posterior, "posterior", None)
    if isinstance(own, Posterior):
        if isinstance(own, BasePosterior):
            check_model(own, model_or_posterior, "`model.posterior`")
        return own
    if is_bayesian(model_or_posterior):
        return VariationalPosterior(model_or_posterior, draw_cache_bytes=0)  # a single batch finds nothing again
    logger.info("%s is not Bayesian: predicting with its point estimate.", type(model_or_posterior).__name__)
    return PointPosterior(model_or_posterior)
