"""`parametrization="rank1"`: which layers take it, and the vectors r and s that they get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .. import nn as bnn
from ..checks import check_choice
from ..distributions import PosteriorPrior, Prior
from ..nn.base import BayesianModule
from .config import PARAMETRIZATIONS
from .registry import Found


def check_parametrization(parametrization: str, estimator: object, prior: Prior) -> None:
    """Check that a conversion can be of this kind.

    Raises:
        ValueError: an unknown kind, or an estimator or prior that rank-1 layers do not take.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization != "rank1":
        return
    if isinstance(prior, PosteriorPrior):
        raise ValueError(
            '`prior` of rank-1 layers must not be another model\'s posterior, with `parametrization`="rank1".'
        )
    for name in estimator.values() if isinstance(estimator, Mapping) else (estimator,):
        bnn.Rank1Linear.check_estimator(name)


def parametrized(found: Found, parametrization: str) -> Found:
    """Return the class for a module as the parametrization has it, or None and the reason why it stays deterministic.

    Args:
        found: the class whose weights would be random themselves, or the reason.
        parametrization: "weights" or "rank1".
    """
    kind, _ = found
    if parametrization == "weights" or kind is None:
        return found
    return (bnn.Rank1Linear, "") if kind is bnn.Linear else (None, 'no torch.nn.Linear, with `parametrization`="rank1"')


def prepare(model: nn.Module, chosen: Mapping[str, type[BayesianModule]]) -> None:
    """Add r = 1 and s = 1 to the layers that become rank-1."""
    for name, kind in chosen.items():
        if issubclass(kind, bnn.Rank1Linear):
            kind.prepare(model.get_submodule(name))


def shapes(module: nn.Module, kind: type[BayesianModule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a module that become random in a class, r and s included."""
    if issubclass(kind, bnn.Rank1Linear):
        weight = module.get_parameter("weight")
        return dict(zip(kind.bayesian_parameters, ((size,) for size in weight.shape), strict=True))
    own = {key: module._parameters.get(key) for key in kind.names_of(module)}
    return {key: tuple(parameter.shape) for key, parameter in own.items() if parameter is not None}


def fixed_means(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every r and s, whose means stay 1."""
    for module in model.modules():
        if isinstance(module, bnn.Rank1Linear):
            yield from (module.get_parameter(name) for name in module.specs)
