"""`parametrization="rank1"` or `"rows"`: which layers take it, and the vectors r and s that they get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .. import nn as bnn
from ..checks import check_choice
from ..distributions import PosteriorPrior, Prior
from ..nn.base import BayesianModule
from .config import PARAMETRIZATIONS
from .registry import Found

_KINDS: dict[str, type[bnn.FactorLinear]] = {"rank1": bnn.Rank1Linear, "rows": bnn.RankLinear}


def check_parametrization(parametrization: str, estimator: object, prior: Prior) -> None:
    """Check that a conversion can be of this kind.

    Raises:
        ValueError: an unknown kind, or an estimator or prior that rank-1 layers do not take.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization not in _KINDS:
        return
    if isinstance(prior, PosteriorPrior):
        raise ValueError(
            f"`prior` must not be another model's posterior, with `parametrization`={parametrization!r}: its layers "
            "have no tensor of it."
        )
    for name in estimator.values() if isinstance(estimator, Mapping) else (estimator,):
        bnn.FactorLinear.check_estimator(name)


def parametrized(found: Found, parametrization: str) -> Found:
    """Return the class for a module as the parametrization has it, or None and the reason why it stays deterministic.

    Args:
        found: the class whose weights would be random themselves, or the reason.
        parametrization: "weights", "rank1" or "rows".
    """
    kind, _ = found
    if parametrization == "weights" or kind is None:
        return found
    refused = f'no torch.nn.Linear, with `parametrization`="{parametrization}"'
    return (_KINDS[parametrization], "") if kind is bnn.Linear else (None, refused)


def prepare(model: nn.Module, chosen: Mapping[str, type[BayesianModule]]) -> None:
    """Add r = 1 and s = 1 to the layers that become rank-1."""
    for name, kind in chosen.items():
        if issubclass(kind, bnn.FactorLinear):
            kind.prepare(model.get_submodule(name))


def shapes(module: nn.Module, kind: type[BayesianModule]) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of a module that become random in a class, r and s included."""
    if issubclass(kind, bnn.FactorLinear):
        return kind.shapes(module)
    own = {key: module._parameters.get(key) for key in kind.names_of(module)}
    return {key: tuple(parameter.shape) for key, parameter in own.items() if parameter is not None}


def fixed_means(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every r and s, whose means stay 1."""
    for module in model.modules():
        if isinstance(module, bnn.FactorLinear):
            yield from (module.get_parameter(name) for name in module.specs)
