"""Which modules a conversion takes: PEFT's name patterns, ties, and what a configuration recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .config import BayesianConfig
from .nn.base import BayesianModule
from .patterns import Patterns, matching, subtrees
from .registry import bayesian_class, is_only_read, supported_layers

Chosen = dict[str, type[BayesianModule]]


def choose(
    model: nn.Module, target: Patterns, exclude: Patterns | None, saved: list[str]
) -> tuple[Chosen, dict[str, str]]:
    names = [name for name, _ in model.named_modules()]
    targeted = set(names) if target == "all" else matching(names, target, "target_modules")
    excluded = set() if exclude is None else subtrees(names, matching(names, exclude, "exclude_modules"))
    chosen: Chosen = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not module._parameters or all(p is None for p in module._parameters.values()):
            continue
        kind, reason = _bayesian_class(model, name, module)
        if any(name == s or name.startswith(f"{s}.") for s in saved):
            skipped[name] = "in modules_to_save"
        elif kind is None:
            skipped[name] = reason
        elif name not in targeted:
            skipped[name] = "not in target_modules"
        elif name in excluded:
            skipped[name] = "in exclude_modules"
        else:
            chosen[name] = kind
    if not chosen:
        raise ValueError(_nothing_to_convert(target, targeted, skipped))
    if not isinstance(target, str):
        _check_each_convertible(target, chosen, skipped)
    _check_ties(model, chosen, skipped)
    return chosen, skipped


def _bayesian_class(model: nn.Module, name: str, module: nn.Module) -> tuple[type[BayesianModule] | None, str]:
    """`bayesian_class`, less the layers whose owner reads their weight and never calls them."""
    kind, reason = bayesian_class(module)
    above, _, attribute = name.rpartition(".")
    owner = model.get_submodule(above)
    if kind is not None and name and is_only_read(owner, attribute):
        return None, f"its weight is read by {type(owner).__name__} without calling the layer"
    return kind, reason


def matching_subtrees(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    if isinstance(patterns, str):
        raise TypeError(f"`modules_to_save` must be a list of module names, got the string {patterns!r}.")
    names = [name for name, _ in model.named_modules()]
    return sorted(matching(names, patterns, "modules_to_save")) if patterns else []


def _check_each_convertible(target: Sequence[str], chosen: Iterable[str], skipped: dict[str, str]) -> None:
    for pattern in target:
        if not any(name == pattern or name.endswith(f".{pattern}") for name in chosen):
            reasons = {r for name, r in skipped.items() if name == pattern or name.endswith(f".{pattern}")}
            raise ValueError(
                f"`target_modules` names {pattern!r}, of which nothing can be converted: "
                f"{', '.join(sorted(reasons)) or 'it holds no weights of its own'}. Supported: {supported_layers()}."
            )


def _nothing_to_convert(target: Patterns, targeted: Iterable[str], skipped: dict[str, str]) -> str:
    reasons = sorted({skipped[name] for name in targeted if name in skipped})[:5]
    return (
        f"`target_modules`={target!r} leaves nothing to convert ({'; '.join(reasons) or 'no layer with weights'}). "
        f"Supported layers: {supported_layers()}."
    )


def owners_of(model: nn.Module, names: Iterable[str]) -> dict[int, list[tuple[str, str]]]:
    """Owners (module, parameter) of each distinct Parameter among the named modules, in their order.

    A model that transformers is still loading declares its ties before it has made them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    same = {
        id(parameters[t]): id(parameters[s])
        for t, s in declared.items()
        if t in parameters and s in parameters and parameters[t].is_meta
    }
    owners: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        for parameter_name, parameter in model.get_submodule(name)._parameters.items():
            if parameter is not None:
                owners.setdefault(same.get(id(parameter), id(parameter)), []).append((name, parameter_name))
    return owners


def _check_ties(model: nn.Module, chosen: Chosen, skipped: dict[str, str]) -> None:
    """A tied weight is one random tensor: all layers that use it convert, or none."""
    owners = owners_of(model, chosen)
    for name in skipped:
        module = model.get_submodule(name)
        for parameter in module._parameters.values():
            if id(parameter) in owners and isinstance(module, (nn.Linear, nn.Embedding)):
                other = owners[id(parameter)][0][0]
                raise ValueError(
                    f"{name!r} shares its weight with {other!r} but stays deterministic ({skipped[name]}): a tied "
                    "weight is Bayesian in all its uses or in none. Name both in `target_modules` or in "
                    "`exclude_modules`."
                )


def check_weights(model: nn.Module, chosen: Iterable[str]) -> None:
    for name in chosen:
        for parameter_name, parameter in model.get_submodule(name)._parameters.items():
            if parameter is not None and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"`model` has NaN or infinite values in {name}.{parameter_name}: no scale can be derived from "
                    "them. Repair the checkpoint, or name the layer in `exclude_modules`."
                )


def recorded(model: nn.Module, config: BayesianConfig) -> Chosen:
    modules = dict(model.named_modules())
    chosen = {}
    position = {name: number for number, name in enumerate(modules)}  # JSON has sorted the names
    for name in sorted(config.modules, key=lambda name: position.get(name, -1)):
        kind = bayesian_class(modules[name])[0] if name in modules else None
        if kind is None or kind.__name__ != config.modules[name]:
            found = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(
                f"`config.bayesian` records {name!r} as {config.modules[name]}, the model has {found} there."
            )
        chosen[name] = kind
    return chosen
