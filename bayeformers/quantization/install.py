"""INT8 weights in a model: which layers get them, how they take the Parameters' place, and the copy that gets them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..conversion.convert import is_bayesian, to_deterministic
from ..conversion.surgery import swap_class
from ..nn.draws import bayesian_modules
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
    """Return layers that can hold INT8, and of every other module with Parameters why not.

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


def twin(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """Return a deterministic copy at the posterior mean, and which of its Parameters stands for which of the model's.

    It has no gradients, and its Parameters share the memory of the model's.

    `own` ends the sharing. Buffers are copies; a posterior that the model carries is left out.
    """
    twins = {parameter: nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()}
    memo: dict[int, Any] = {id(parameter): shared for parameter, shared in twins.items()}
    for layer in bayesian_modules(model).values():
        memo |= {id(buffer): buffer for buffer in layer.buffers(recurse=False)}  # the prior's: dropped at once
    carried = vars(model).get("posterior")
    if carried is not None:
        memo[id(carried)] = None
    copied = copy.deepcopy(model, memo)
    vars(copied).pop("posterior", None)
    if is_bayesian(copied):
        to_deterministic(copied)
    return copied.requires_grad_(False), twins


def own(model: nn.Module, shared: Iterable[nn.Parameter]) -> None:
    """Give the model memory of its own for those of the ``shared`` Parameters that it still has.

    In the Parameter itself: a recurrent layer keeps a second list of its Parameters.
    """
    known = set(shared)
    for parameter in model.parameters():
        if parameter in known:
            parameter.data = parameter.detach().clone()
