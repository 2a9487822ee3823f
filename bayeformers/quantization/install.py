"""INT8 weights in a model: which layers get them, and how they take the Parameters' place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..conversion.surgery import swap_class
from ..patterns import Patterns, matching, subtrees
from .codes import Codes
from .layers import Arithmetic, QuantizedLayer, quantized_kind


@dataclass(eq=False)
class Weight:
    """One distinct weight and the layers that use it.

    Attributes:
        name: first name of its Parameter in the model.
        owners: names of the layers.
        arithmetic: of their products.
        dtype: of the float weight.
        codes: its INT8 values.
    """

    name: str
    owners: tuple[str, ...]
    arithmetic: Arithmetic
    dtype: torch.dtype
    codes: Codes = field(repr=False)


def parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Every distinct Parameter by its first name."""
    return {parameter: name for name, parameter in model.named_parameters()}


def kinds(model: nn.Module, exclude: Patterns | None = None) -> tuple[dict[str, type[QuantizedLayer]], dict[str, str]]:
    """Layers that can hold INT8, and of every other module with Parameters why not.

    A tied weight is INT8 in all its layers, with the same channels, or in none.
    """
    names = [name for name, _ in model.named_modules()]
    excluded = set() if exclude is None else subtrees(names, matching(names, exclude, "exclude_modules"))
    found: dict[str, type[QuantizedLayer]] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            above, _, attribute = name.rpartition(".")
            kind, reason = quantized_kind(module, model.get_submodule(above) if name else None, attribute)
            if kind is None or name in excluded:
                skipped[name] = reason or "in exclude_modules"
            else:
                found[name] = kind
    for name in _badly_tied(model, found):
        skipped[name] = "its weight is tied to a layer that holds it otherwise"
        del found[name]
    return found, skipped


def _badly_tied(model: nn.Module, found: Mapping[str, type[QuantizedLayer]]) -> list[str]:
    uses = list(owners(model))
    wrong = set()
    for parameter in {parameter for parameter, _, _ in uses}:
        users = [(name, key) for other, name, key in uses if other is parameter]
        axes = {found[name].axis if name in found and key == "weight" else None for name, key in users}
        if len(axes) > 1:
            wrong |= {name for name, _ in users if name in found}
    return sorted(wrong)


def owners(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, str]]:
    """Every use of a Parameter: itself, the module's name, its name there."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield parameter, name, key


def install(model: nn.Module, weights: Iterable[Weight]) -> None:
    """Replace float weights by INT8 ones, in place."""
    for weight in weights:
        step = nn.Parameter(weight.codes.step, requires_grad=False)
        for name in weight.owners:
            above, _, attribute = name.rpartition(".")
            module = model.get_submodule(name)
            kind, _ = quantized_kind(module, model.get_submodule(above) if name else None, attribute)
            assert kind is not None  # `kinds` found it
            swap_class(module, kind)
            assert isinstance(module, QuantizedLayer)
            module.become_quantized(weight.codes.codes, step, weight.arithmetic, weight.dtype)
