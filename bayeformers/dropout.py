"""Switching dropout off and on again: modules, rates that a forward reads from its module, layer dropping."""

from __future__ import annotations

import re

from torch import nn

_DROPOUT_ATTRIBUTE = re.compile(r"(^|_)(dropout|layerdrop|drop_prob|drop_path|drop)($|_)")


def dropout_rates(model: nn.Module) -> dict[str, float]:
    """Every dropout rate > 0: `nn.Dropout` modules by name, rates that a forward reads by ``module.attribute``."""
    rates: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                rates[name] = float(module.p)
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, float) and 0 < value <= 1 and _DROPOUT_ATTRIBUTE.search(attribute):
                rates[f"{name}.{attribute}".lstrip(".")] = value
    layerdrop = getattr(getattr(model, "config", None), "layerdrop", None)
    if isinstance(layerdrop, float) and layerdrop > 0:  # Wav2Vec2 and its kin read it from the config in forward
        rates["config.layerdrop"] = layerdrop
    return rates


def set_dropout(model: nn.Module, key: str, rate: float) -> None:
    if key == "config.layerdrop":
        model.config.layerdrop = rate  # type: ignore[union-attr]
        return
    modules = dict(model.named_modules())
    if isinstance(modules.get(key), nn.modules.dropout._DropoutNd):
        modules[key].p = rate
        return
    parent, _, attribute = key.rpartition(".")
    if parent in modules and hasattr(modules[parent], attribute):
        setattr(modules[parent], attribute, rate)
