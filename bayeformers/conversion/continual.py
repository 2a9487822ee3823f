"""Continual fine-tuning: a trained posterior, taken out of its model, as the next task's prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..distributions import DiagonalNormal, PosteriorPrior, Prior
from ..nn.base import BayesianModule, NamedVariational, variational_tensors


class HasModel(Protocol):
    """A `VariationalPosterior`: it holds the model whose posterior it is."""

    model: nn.Module


def posterior_as_prior(
    model: nn.Module | HasModel, *, exclude: Sequence[str] = (), relative_scale: float = 1.0
) -> PosteriorPrior:
    """Return the present posterior of a converted model, copied, as a prior for `to_bayesian`.

    Later training of ``model``, or `to_deterministic(model)`, does not change it. For the next task on the same
    network: take it, call `to_deterministic(model)`, change the head, and `to_bayesian(model, prior=...)`; every weight
    that the posterior has then starts at its scale and is held to its mean as firmly as the last task knew it.
    Variational continual learning: Nguyen et al. 2018 (arXiv 1710.10628).

    Args:
        model: a converted model, or its `VariationalPosterior`.
        exclude: names of tensors, or of modules with all inside them, to leave out: a head that is to start afresh.
        relative_scale: of the `MopedPrior` of tensors that the posterior has not.

    Raises:
        TypeError: neither.
        ValueError: the model is not Bayesian, or a name in ``exclude`` matches no tensor.

    >>> from bayeformers import to_bayesian, to_deterministic
    >>> model = to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    >>> prior = posterior_as_prior(model, exclude=["2"])
    >>> to_bayesian(to_deterministic(model), prior=prior)[0].prior
    PosteriorPrior(fresh=('2.weight', '2.bias'), relative_scale=1.0)
    """
    if isinstance(exclude, str):
        raise TypeError(f"`exclude` must be a list of names, got {exclude!r}: write [{exclude!r}].")
    tensors = list(variational_tensors(_bayesian_model(model)))
    for name in exclude:
        if not any(_within(tensor.name, name) for tensor in tensors):
            raise ValueError(
                f"`exclude` names {name!r}, which holds no tensor of the posterior, such as {tensors[0].name!r}."
            )
    kept = {t.name: _copied(t) for t in tensors if not any(_within(t.name, name) for name in exclude)}
    return PosteriorPrior(relative_scale=relative_scale, tensors=kept)


def as_prior(prior: Prior | nn.Module | HasModel) -> Prior:
    """``prior`` itself, or the prior made of a converted model or of its variational posterior."""
    if isinstance(prior, nn.Module) or hasattr(prior, "model"):
        return posterior_as_prior(prior)
    return prior  # a Prior, or what the configuration refuses


def fitted_prior(prior: Prior, shapes: Mapping[str, tuple[int, ...]]) -> Prior:
    """A posterior as prior, checked against the tensors that are to become random; any other prior as it is."""
    return prior.fitted_to(shapes) if isinstance(prior, PosteriorPrior) else prior


def without_posterior(prior: Prior) -> tuple[Prior, Mapping[str, DiagonalNormal]]:
    """A configuration is small: the model's buffers keep the tensors of a posterior that serves as prior."""
    return (prior.without_tensors(), prior.tensors) if isinstance(prior, PosteriorPrior) else (prior, {})


def store_posterior(
    model: nn.Module,
    prior: PosteriorPrior,
    posterior: Mapping[str, DiagonalNormal],
    owners: list[tuple[str, str]],
) -> None:
    """Give each tensor that is not fresh its own prior, and start it there; a reload fills in the values.

    Args:
        model: whose layers have become Bayesian.
        prior: tells which tensors are fresh, and so keep the layer's prior.
        posterior: of the last task, by the tensor's name; empty while a checkpoint is loaded.
        owners: the first module's name, and the Parameter's name there, of each random tensor.
    """
    for name, parameter in owners:
        key, module = ".".join(filter(None, (name, parameter))), model.get_submodule(name)
        assert isinstance(module, BayesianModule)
        if key in posterior:
            module.store_prior(parameter, posterior[key].loc, posterior[key].scale)
            module.set_scale(parameter, posterior[key].scale.to(module.get_parameter(parameter).device))
        elif key not in prior.fresh:
            loc = module.get_parameter(parameter)
            module.store_prior(parameter, loc, module.initial_scale(parameter, loc)(loc))


def _bayesian_model(source: Any) -> nn.Module:
    model = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a converted model or its VariationalPosterior, got {type(source).__name__}.")
    if next(variational_tensors(model), None) is None:
        raise ValueError(
            f"`prior` is to be the posterior of a {type(source).__name__} whose model has no Bayesian layer: give a "
            "model that `to_bayesian` converted, or its VariationalPosterior."
        )
    return model


@torch.no_grad()
def _copied(tensor: NamedVariational) -> DiagonalNormal:
    return DiagonalNormal(tensor.loc.detach().clone(), tensor.scale().detach().clone())


def _within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
