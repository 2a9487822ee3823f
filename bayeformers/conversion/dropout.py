"""Switching dropout off and on again: modules, rates that a forward reads from its module, layer dropping."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Hashable
from typing import cast

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
            is_rate = isinstance(value, float) and 0 < value <= 1 and _DROPOUT_ATTRIBUTE.search(attribute)
            if is_rate and not _is_factor(cast(Hashable, type(module)), attribute):
                rates[f"{name}.{attribute}".lstrip(".")] = value
    layerdrop = getattr(getattr(model, "config", None), "layerdrop", None)
    if isinstance(layerdrop, float) and layerdrop > 0:  # Wav2Vec2 and its kin read it from the config in forward
        rates["config.layerdrop"] = layerdrop
    return rates


@functools.cache
def _is_factor(kind: Hashable, attribute: str) -> bool:
    """Whether the forward multiplies by 1 - rate in `eval()` (PPLCNet, NLLB-MoE): part of the mean, left alone."""
    try:
        source = inspect.getsource(cast(type, kind))
    except (OSError, TypeError):
        return False
    return re.search(rf"\*=?\s*\(?\s*1(\.0)?\s*-\s*self\.{attribute}\b", source) is not None


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
