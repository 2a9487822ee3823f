"""Joint draws: draw s is one network, or one linearised network, for every row of the pool and of the targets.

`predict(method="glm")` of a Laplace posterior gives each row a Gaussian of its own, whose draws know nothing of other
rows' draws: they have no joint information. What is used here of such a posterior is the linearised network at drawn
weights, `laplace.linear_draws`, or the network itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast

import torch

from ..checks import is_real
from ..forward import Inputs
from ..laplace import LaplacePosterior
from ..laplace.linear_draws import linearized_draws
from ..likelihoods import get_likelihood
from ..posteriors import DropoutPosterior, MixturePosterior, Posterior, TemperaturePosterior
from ..posteriors.heads import has_many_logits, without_labels
from ..predictive import Predictive

__all__ = ["DrawMethod", "are_joint", "joint_predictive", "number_of_draws"]

DrawMethod = Literal["sample", "linearized"]


def joint_predictive(
    posterior: Posterior, inputs: Inputs, *, num_samples: int, method: DrawMethod | None, seed: int
) -> Predictive:
    """Return a batch's prediction by draws 0 .. S - 1 of ``seed``, which are the same networks in every batch.

    Args:
        posterior: whose draws.
        inputs: of the model's forward, without labels.
        num_samples: S; of a mixture in all.
        method: "sample", the network itself at drawn weights; "linearized", of a Laplace posterior; None: the latter of
            a Laplace posterior whose default is linearised, else the former.
        seed: of the draws.

    Raises:
        ValueError: "linearized" of another posterior, a mixture with unequal weights, a calibration that is no
            temperature.
    """
    options: dict[str, Any] = {"num_samples": num_samples, "method": method, "seed": seed}
    if isinstance(posterior, TemperaturePosterior):
        return _tempered(posterior, joint_predictive(posterior.base, inputs, **options))
    if isinstance(posterior, MixturePosterior):
        return _mixed(posterior, inputs, **options)
    is_linear = isinstance(posterior, LaplacePosterior) and posterior.default_method != "sample"
    if method == "linearized" and not isinstance(posterior, LaplacePosterior):
        raise ValueError(
            f"`method`='linearized' draws of a LaplacePosterior, got {type(posterior).__name__}; use 'sample'."
        )
    if method == "sample" or not is_linear:
        return posterior.predict(inputs, num_samples=num_samples, method="sample", seed=seed)
    return _linearized(cast(LaplacePosterior, posterior), inputs, num_samples, seed)


def _linearized(posterior: LaplacePosterior, inputs: Inputs, num_samples: int, seed: int) -> Predictive:
    problem, inputs = posterior.problem_type(), without_labels(posterior.model, inputs)
    if has_many_logits(posterior.model, problem):
        raise ValueError(
            f"`method`='linearized' needs few logits per prediction, got a {problem!r} head; use 'sample'."
        )
    likelihood = get_likelihood(problem)
    drawn = linearized_draws(posterior, inputs, num_samples=num_samples, seed=seed)
    values = torch.stack([likelihood.values(logits, inputs) for logits in drawn])
    if likelihood.has_noise:
        return Predictive(problem_type=problem, values=values, noise_std=posterior.noise_std)
    return Predictive(problem_type=problem, log_probs=values, mask=likelihood.attended(values[0], inputs))


def _tempered(posterior: TemperaturePosterior, predictive: Predictive) -> Predictive:
    """Each draw with its temperature: only a scalar one leaves every draw a network of its own."""
    if posterior.kind != "scalar" or predictive.log_probs is None:
        raise ValueError(
            "`posterior` must be calibrated by one temperature of class probabilities, got "
            f"{posterior!r}: acquire by its `base`."
        )
    log_probs = (predictive.log_probs.double() / posterior.temperature).log_softmax(-1)
    return replace(predictive, log_probs=log_probs.to(predictive.log_probs.dtype), log_normalizers=None)


def _mixed(posterior: MixturePosterior, inputs: Inputs, *, num_samples: int, **options: Any) -> Predictive:
    """As many draws of every component, whose plain average is the mixture."""
    if len(set(posterior.weights)) > 1:
        raise ValueError(f"`posterior` must be a mixture of equal `weights`, got {posterior.weights}.")
    each = number_of_draws(cast(Posterior, posterior), num_samples) // len(posterior.components)
    parts = [joint_predictive(part, inputs, num_samples=each, **options) for part in posterior.components]
    if parts[0].log_probs is None:
        noises = {part.noise_std for part in parts}
        if len(noises) > 1:
            raise ValueError(f"`posterior` must have one noise for all components of a regression, got {noises}.")
        return replace(parts[0], values=torch.cat([cast(torch.Tensor, part.values) for part in parts]))
    log_probs = torch.cat([cast(torch.Tensor, part.log_probs) for part in parts])
    return replace(parts[0], log_probs=log_probs, log_normalizers=None)


def number_of_draws(posterior: Posterior, num_samples: int) -> int:
    """Return how many draws `joint_predictive` makes: no more than there are, and as many of every component."""
    if isinstance(posterior, TemperaturePosterior):
        return number_of_draws(posterior.base, num_samples)
    if isinstance(posterior, MixturePosterior):
        count = len(posterior.components)
        each = max(1, num_samples // count)
        return count * min(number_of_draws(part, each) for part in posterior.components)
    return num_samples if posterior.num_draws is None else min(num_samples, posterior.num_draws)


def are_joint(posterior: Posterior) -> bool:
    """Whether a draw is one network for all rows; dropout's masks of elements are drawn anew for every row."""
    if isinstance(posterior, TemperaturePosterior):
        return are_joint(posterior.base)
    if isinstance(posterior, MixturePosterior):
        return all(map(are_joint, posterior.components))
    return not (isinstance(posterior, DropoutPosterior) and posterior.masks == "element")


def noise_variance(predictive: Predictive) -> torch.Tensor:
    """Return a regression's noise variance per row, (B,).

    Raises:
        ValueError: it is not known, or there are several outputs.
    """
    if predictive.values is None or predictive.values.dim() != 2:
        raise ValueError("`acquire` takes regressions of one output, got several; use `strategy`='random'.")
    if not is_real(predictive.noise_std) and predictive.noise_variance is None:
        raise ValueError(
            "`posterior` must know its regression's noise, got None: record it as `noise_std` in training or fitting."
        )
    return predictive.aleatoric_variance
