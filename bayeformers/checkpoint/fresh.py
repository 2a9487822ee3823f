"""Layers of a loaded model that the checkpoint has in another size: they start afresh, without a posterior."""

from __future__ import annotations

import logging

from torch import nn

from ..conversion.convert import bayesian_config, update_config
from ..conversion.surgery import swap_class
from ..nn.base import BayesianModule
from ..nn.draws import bayesian_modules

logger = logging.getLogger(__name__)


def become_fresh(model: nn.Module, mismatched: set[str]) -> None:
    """Make the layers that own tensors of ``mismatched`` deterministic and trainable, and record them so.

    A fresh weight has no posterior: the scale delta |weight| of `to_bayesian` says how well training knows a weight,
    and a frozen random head could learn nothing. So it is what ``modules_to_save`` says of a fresh head.

    Raises:
        ValueError: a scale alone has another size than its weight.
    """
    if not mismatched:
        return
    sizes = {name: model.get_parameter(name) for name in mismatched if _is_parameter(model, name)}
    means = {id(parameter) for name, parameter in sizes.items() if not name.endswith("_rho")}
    layers = bayesian_modules(model)
    fresh = {
        name: layer
        for name, layer in layers.items()
        if any(id(layer.get_parameter(key)) in means for key in layer.specs)
    }
    alone = sorted(name for name in mismatched if name.endswith("_rho") and name.rpartition(".")[0] not in fresh)
    if alone:
        raise ValueError(f"The checkpoint has scales of another size than their weights: {alone[:3]} ({len(alone)}).")
    for layer in fresh.values():
        _start(layer)
    if fresh:
        config = bayesian_config(model)
        update_config(
            model,
            modules={name: kind for name, kind in config.modules.items() if name not in fresh},
            modules_to_save=[*config.modules_to_save, *fresh],
        )
        logger.warning(
            "%s (%d) have another size in the checkpoint: they start afresh, deterministic and trainable, without a "
            "posterior. Train them; `to_deterministic(model)` and `to_bayesian` then make them Bayesian.",
            sorted(fresh)[:3],
            len(fresh),
        )


def _start(layer: BayesianModule) -> None:
    kind = type(layer).torch_class
    names = list(layer.specs)
    layer.become_deterministic()
    swap_class(layer, kind)
    for name in names:
        layer.get_parameter(name).requires_grad_(True)


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, key = name.rpartition(".")
    return key in model.get_submodule(module)._parameters
