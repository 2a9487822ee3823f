"""`init_bayesian_with_frequentist`: the weights of a trained network into its hand-built Bayesian twin."""

from __future__ import annotations

import torch
from torch import nn

from ...nn import variational_tensors
from ..checks import check_bool
from ..deprecation import deprecated


def init_bayesian_with_frequentist(bayesian: nn.Module, frequentist: nn.Module, freeze: bool = True) -> nn.Module:
    """Copy the weights of ``frequentist`` into the means of ``bayesian``, Parameter by Parameter, in their order.

    The two share nothing afterwards. Scales start anew at their initial share of the new means. Now:
    `bayeformers.to_bayesian(frequentist)`, which needs no twin.

    Args:
        bayesian: a model with Bayesian layers.
        frequentist: the same network without them.
        freeze: whether the copied Parameters stay as they are and the scales alone train.

    Returns:
        ``bayesian``.

    Raises:
        TypeError, ValueError: no modules, no Bayesian layer, or Parameters whose number or shapes differ; ``bayesian``
            is unchanged then.

    >>> from bayeformers.compat.bayetorch.layers import BayesianLinear
    >>> trained = nn.Linear(2, 1)
    >>> twin = init_bayesian_with_frequentist(BayesianLinear(2, 1), trained)
    >>> bool((twin.weight == trained.weight).all()), twin.weight.requires_grad
    (True, False)
    """
    deprecated("bayetorch.convert.init_bayesian_with_frequentist", "`bayeformers.to_bayesian(frequentist)`")
    copy_weights(bayesian, frequentist, freeze)
    return bayesian


def copy_weights(bayesian: nn.Module, frequentist: nn.Module, freeze: bool) -> None:
    """Copy the weights of a network into its Bayesian twin: :func:`init_bayesian_with_frequentist` without its warning.

    Args:
        bayesian: a model with Bayesian layers, whose means are written.
        frequentist: the same network without them.
        freeze: whether the copied Parameters stay as they are and the scales alone train.

    Raises:
        TypeError: an argument is no module, or ``freeze`` no bool.
        ValueError: ``bayesian`` has no Bayesian layer, or the Parameters differ in number or shape.
    """
    check_bool("freeze", freeze)
    for name, model in (("bayesian", bayesian), ("frequentist", frequentist)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"`{name}` must be a torch.nn.Module, got {type(model).__name__}.")
    tensors = list(variational_tensors(bayesian))
    if not tensors:
        raise ValueError(f"`bayesian` ({type(bayesian).__name__}) has no Bayesian layer.")
    scales = {id(tensor.rho) for tensor in tensors}
    targets = {name: p for name, p in bayesian.named_parameters() if id(p) not in scales}
    sources = dict(frequentist.named_parameters())
    _check_alike({n: tuple(p.shape) for n, p in targets.items()}, {n: tuple(p.shape) for n, p in sources.items()})
    with torch.no_grad():
        for target, source in zip(targets.values(), sources.values(), strict=True):
            target.copy_(source)
            target.requires_grad_(not freeze)
    for tensor in tensors:
        module, name = tensor.module, tensor.parameter_name
        module.drop_centre(name)
        module.reset_rho(name)
        if not freeze:
            module.store_centre(name)


def _check_alike(bayesian: dict[str, tuple[int, ...]], frequentist: dict[str, tuple[int, ...]]) -> None:
    if len(bayesian) != len(frequentist):
        raise ValueError(
            f"`frequentist` must have the {len(bayesian)} Parameters of `bayesian` besides its scales, "
            f"got {len(frequentist)}."
        )
    for (name, shape), (other, given) in zip(bayesian.items(), frequentist.items(), strict=True):
        if shape != given:
            raise ValueError(
                f"`frequentist` has {other!r} of shape {given} where `bayesian` has {name!r} of shape {shape}: "
                "the two must hold the same layers in the same order."
            )
