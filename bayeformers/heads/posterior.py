"""`HeadPosterior`: the posterior of a model whose last layer is one, with its predictive in one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..checks import check_choice
from ..forward import Inputs, check_filled
from ..likelihoods import HEAD, NoiseStd, ProblemType, check_noise_std, check_problem_type, get_likelihood
from ..linearized.links import Link, linearized_predictive
from ..posteriors import WeightsPosterior
from ..posteriors.heads import without_labels
from ..posteriors.weights import Values
from ..predictive import Predictive
from ..sampling.views import viewed
from .base import features_of
from .find import check_likelihood, head_of

__all__ = ["HeadPosterior"]

logger = logging.getLogger(__name__)

HEAD_METHOD = "head"
"""The default method: the head's own Gaussian, in one forward pass."""

_UNFITTED = (
    "This SNGP head has no covariance yet, which `fit_covariance` computes from the training data: predicting with its "
    "mean alone."
)


class HeadPosterior(WeightsPosterior):
    """What a model says whose last layer `to_vbll` or `to_sngp` made; it lies in the model's own weights.

    `predict` runs the encoder once: the logits are Gaussian given what the head reads, and a link makes probabilities
    of that. A draw samples the head's weights.

    Args:
        model: with such a head.
    """

    default_method = HEAD_METHOD
    follows_weights = True
    predicts_itself = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head_of(model)

    def predict(
        self,
        inputs: Inputs,
        *,
        num_samples: int = 16,
        method: str | None = None,
        link: Link = "auto",
        seed: int = 0,
        problem_type: ProblemType | None = None,
        noise_std: NoiseStd | None = None,
        **options: Any,
    ) -> Predictive:
        """What the head says about ``inputs``.

        Args:
            inputs: what the model's ``forward`` takes; labels are ignored.
            num_samples: of "sample".
            method: "head" (the default, and "glm"): the Gaussian of the logits, in one forward pass; "sample": average
                over draws of the head's weights, without the noise of VBLL's logits.
            link: from Gaussian logits to probabilities, see `linearized.links`; SNGP's mean-field logits are
                "probit_diagonal".
            seed: the same seed gives the same draws.
            problem_type: what the head predicts.
            noise_std: a regression's noise; by default the head's own.
            **options: of `BasePosterior.predict`, for "sample".

        Returns:
            The prediction, with `logit_mean` and `logit_covariance`.

        Raises:
            ValueError: an argument is not one of these.
        """
        method = self.default_method if method is None else method
        check_choice("method", method, (HEAD_METHOD, "glm", "sample", "nn"))
        problem = self.problem_type() if problem_type is None else check_problem_type(problem_type)
        if method in ("sample", "nn"):
            return super().predict(
                inputs,
                num_samples=num_samples,
                method="sample",
                seed=seed,
                problem_type=problem,
                noise_std=noise_std,
                **options,
            )
        head, likelihood = head_of(self.model), get_likelihood(problem)
        check_likelihood(head, likelihood)
        if likelihood.has_noise:
            noise_std = self.recorded_noise_std() if noise_std is None else check_noise_std(noise_std)
            if noise_std == HEAD:
                raise ValueError('`noise_std` must be a number or None for this head, which has its own, got "head".')
        inputs = without_labels(self.model, inputs)
        check_filled(inputs)
        with torch.no_grad(), viewed(self.model, training=False) as view:
            head = head_of(view.model)
            _, features = features_of(view.model, head, inputs)
            with torch.autocast(features.device.type, enabled=False):
                mean = head.mean(features)
                variance = head.variance(features) if head.is_fitted else torch.zeros_like(mean)
        if not head.is_fitted:
            logger.warning(_UNFITTED)
        mask = likelihood.attended(mean, inputs)
        return linearized_predictive(
            mean, variance.diag_embed(), problem, link=link, seed=seed, noise_std=noise_std, mask=mask
        )

    def random_parameters(self) -> Iterable[nn.Parameter]:
        """The head's weight, and its bias."""
        head = head_of(self.model)
        bias = getattr(head, "bias", None)
        return [head.weight] if bias is None else [head.weight, bias]

    def weights(self, index: int, seed: int) -> Values:
        """The head's weight, and its bias, in a draw.

        Args:
            index: the draw's place in the sequence, >= 0.
            seed: which sequence of draws.

        Returns:
            Parameters with their values.
        """
        return head_of(self.model).sampled(index, seed)

    def recorded_noise_std(self) -> NoiseStd | None:
        """The head's noise sigma, of a regression; else None."""
        head = head_of(self.model)
        return float(head.noise_variance.detach().sqrt()) if head.is_regression else None

    def save(self, directory: str | PathLike[str]) -> None:
        """The model with its head, of which the posterior is a part."""
        self.model.save_pretrained(directory)  # type: ignore[operator]
