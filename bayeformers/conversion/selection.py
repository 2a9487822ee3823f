"""Which modules a conversion takes: PEFT's name patterns, ties, and what a configuration recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..nn.adapters import adapter_parts
from ..nn.base import BayesianModule
from ..nn.estimators import REPARAMETERIZATION, get_estimator
from ..nn.norms import Normalization
from ..nn.parameters import name_clash
from ..patterns import Patterns, matches, matching, subtrees
from .adapters import active_names, entries_of, random_entries
from .config import BayesianConfig, Parametrization
from .rank1 import parametrized
from .registry import Found, bayesian_class, is_layer, supported_layers
from .ties import full_name

Chosen = dict[str, type[BayesianModule]]


def choose(
    model: nn.Module,
    target: Patterns | None,
    exclude: Patterns | None,
    saved: list[str],
    norms: bool = False,
    parametrization: Parametrization = "weights",
) -> tuple[Chosen, dict[str, str]]:
    """Return the modules to convert with their Bayesian class, and all others with the reason why not.

    Args:
        model: to be converted.
        target: `target_modules`; None: the active adapters.
        exclude: `exclude_modules`.
        saved: names of modules that stay deterministic, with all inside them.
        norms: whether normalisations are converted too.
        parametrization: what is random in a layer.

    Raises:
        ValueError: nothing is left to convert, or a name of ``target`` is of nothing convertible.
    """
    entries = entries_of(model)
    names = [name for name, _ in model.named_modules()]
    names += [f"{name}.{key}" for name, keys in entries.items() for key in keys]
    targeted = _targeted(model, names, target)
    excluded = set() if exclude is None else subtrees(names, matching(names, exclude, "exclude_modules"))
    chosen: Chosen = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not module._parameters or all(p is None for p in module._parameters.values()):
            continue
        keys = [key for key in entries.get(name, ()) if f"{name}.{key}" in targeted - excluded]
        found = _bayesian_class(model, name, module)
        if name in entries and target != "all":
            found = _entries_class(module, keys, found)
        kind, reason = parametrized(found, parametrization)
        if kind is not None and issubclass(kind, Normalization) and not norms:
            kind, reason = None, "a normalisation: `norms=True` converts it"
        if any(name == s or name.startswith(f"{s}.") for s in saved):
            skipped[name] = "in modules_to_save"
        elif kind is None:
            skipped[name] = reason
        elif name not in targeted and not keys:
            skipped[name] = "not of an active adapter" if target is None else "not in target_modules"
        elif name in excluded:
            skipped[name] = "in exclude_modules"
        else:
            chosen[name] = kind
            why = "not a matrix, of a module without a rule for it"
            why = why if parametrization == "weights" else "its factors are random"
            skipped |= dict.fromkeys(_left_alone(name, module, kind), why)
    if not chosen:
        raise ValueError(_nothing_to_convert(target, targeted, skipped))
    if target is not None and not isinstance(target, str):
        _check_each_convertible(target, _with_entries(model, chosen), skipped)
    check_ties(model, chosen, skipped)
    return chosen, skipped


def meant(
    model: nn.Module, chosen: Chosen, target: Patterns | None, exclude: Patterns | None, saved: list[str]
) -> frozenset[str]:
    """Return the modules that a conversion is meant for, whether or not they can be converted.

    Args:
        model: to be converted.
        chosen: the modules that are converted, which are the answer unless ``target`` is "all".
        target: `target_modules`; of "all" the answer is all modules but those left out.
        exclude: `exclude_modules`, which are left out with all inside them.
        saved: names of modules that stay deterministic, with all inside them.
    """
    if not isinstance(target, str) or target != "all":
        return frozenset(chosen)
    names = [name for name, _ in model.named_modules()]
    left = subtrees(names, {*saved, *(() if exclude is None else matching(names, exclude, "exclude_modules"))})
    return frozenset(names) - left


def _bayesian_class(model: nn.Module, name: str, module: nn.Module) -> Found:
    """`bayesian_class` of a module by its place in the model."""
    above, _, attribute = name.rpartition(".")
    return bayesian_class(module, model.get_submodule(above) if name else None, attribute)


def _left_alone(name: str, module: nn.Module, kind: type[BayesianModule]) -> list[str]:
    """Names of a converted module's own Parameters that stay deterministic."""
    rest = [key for key, p in module._parameters.items() if p is not None and key not in kind.names_of(module)]
    return [f"{name}.{key}".lstrip(".") for key in rest]


def matching_subtrees(model: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the modules that `modules_to_save` names; TypeError for a string, which is no list."""
    if isinstance(patterns, str):
        raise TypeError(f"`modules_to_save` must be a list of module names, got the string {patterns!r}.")
    names = [name for name, _ in model.named_modules()]
    return sorted(matching(names, patterns, "modules_to_save")) if patterns else []


def _targeted(model: nn.Module, names: list[str], target: Patterns | None) -> set[str]:
    """The names that are meant; what is named as PEFT names it, such as "lora_A", means the active adapters' parts."""
    if target is None:
        return active_names(model)
    if target == "all":
        return set(names)
    matched = matching(names, target, "target_modules")
    return matched | active_names(model, matched)


def _entries_class(module: nn.Module, keys: list[str], found: Found) -> Found:
    """Of a `ParameterDict` of adapters the class in which the entries ``keys`` are random."""
    kind = random_entries(module, keys)
    clash = name_clash(module)
    if kind is None or clash is not None:
        return None, found[1] or f"{type(module).__name__} has no entry that is meant" if clash is None else found[1]
    return kind, ""


def entries_in(model: nn.Module, chosen: Chosen) -> dict[str, list[str]]:
    """Of the `ParameterDict`s of adapters among the modules ``chosen``, which entries become random."""
    known = entries_of(model)
    return {name: list(kind.bayesian_parameters) for name, kind in chosen.items() if name in known}


def _with_entries(model: nn.Module, chosen: Chosen) -> list[str]:
    """Names of the modules ``chosen``, and of what holds them or they hold in an adapter, as PEFT says it."""
    own = [f"{name}.{key}" for name, keys in entries_in(model, chosen).items() for key in keys]
    return [*chosen, *own, *(part.container for part in adapter_parts(model) if part.holds_any(chosen))]


def _check_each_convertible(target: Sequence[str], chosen: Iterable[str], skipped: dict[str, str]) -> None:
    chosen = list(chosen)
    for pattern in target:
        if not any(name == pattern or name.endswith(f".{pattern}") for name in chosen):
            reasons = {r for name, r in skipped.items() if name == pattern or name.endswith(f".{pattern}")}
            raise ValueError(
                f"`target_modules` names {pattern!r}, of which nothing can be converted: "
                f"{', '.join(sorted(reasons)) or 'it holds no weights of its own'}. Supported: {supported_layers()}."
            )


def _nothing_to_convert(target: Patterns | None, targeted: Iterable[str], skipped: dict[str, str]) -> str:
    reasons = sorted({skipped[name] for name in targeted if name in skipped})[:5]
    if target is None and not targeted:
        reasons = ['no adapter is active: call `set_adapter`, or leave `disable_adapter()`; or name "all"']
    return (
        f"`target_modules`={target!r} leaves nothing to convert ({'; '.join(reasons) or 'no layer with weights'}). "
        f"Supported layers: {supported_layers()}."
    )


def owners_of(model: nn.Module, chosen: Chosen) -> dict[int, list[tuple[str, str]]]:
    """Return the owners (module, parameter) of each distinct Parameter that becomes random, in the order of ``chosen``.

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
    for name, kind in chosen.items():
        module = model.get_submodule(name)
        random = kind.names_of(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and key in random:
                owners.setdefault(same.get(id(parameter), id(parameter)), []).append((name, key))
    return owners


def random_names(model: nn.Module, chosen: Chosen) -> list[str]:
    """Every name of every tensor that becomes random."""
    return [full_name(owner) for shared in owners_of(model, chosen).values() for owner in shared]


def first_names(model: nn.Module, chosen: Chosen) -> dict[int, str]:
    """By the id of each distinct Parameter that becomes random, the name of its first owner."""
    return {key: full_name(owners[0]) for key, owners in owners_of(model, chosen).items()}


def owner_shapes(model: nn.Module, chosen: Chosen) -> dict[str, tuple[int, ...]]:
    """Shape of each distinct tensor that becomes random, by the name of its first owner."""
    names = [".".join(filter(None, owners[0])) for owners in owners_of(model, chosen).values()]
    return {name: tuple(model.get_parameter(name).shape) for name in names}


def check_ties(model: nn.Module, chosen: Chosen, skipped: dict[str, str]) -> None:
    """Check that of a tied weight, which is one random tensor, all layers that use it convert, or none.

    Args:
        model: to be converted.
        chosen: the modules to convert with their Bayesian class.
        skipped: the other modules with the reason why they stay deterministic.

    Raises:
        ValueError: a layer stays deterministic and shares a weight with one that converts.
    """
    owners = owners_of(model, chosen)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if name in chosen or parameter is None or id(parameter) not in owners:
                continue
            if parameter.dim() > 1 or is_layer(module):  # a vector may only have a second name, as a head's bias
                raise ValueError(
                    f"{name!r} shares its {key} with {owners[id(parameter)][0][0]!r} but stays deterministic "
                    f"({skipped[name]}): a tied weight is Bayesian in all its uses or in none. Name both in "
                    "`target_modules` or in `exclude_modules`."
                )


def estimators_of(names: Iterable[str], estimator: str | Mapping[str, str]) -> dict[str, str]:
    """Each layer's estimator: the one for all, or that of the first pattern that matches the layer."""
    names = list(names)
    if not isinstance(estimator, Mapping):
        return dict.fromkeys(names, get_estimator(estimator).name)
    if not estimator:
        raise ValueError("`estimator` is an empty mapping; give one of the estimators, or patterns of modules.")
    found = dict.fromkeys(names, "")
    for pattern, value in estimator.items():
        matched = [name for name in names if matches(name, pattern, "estimator")]
        if not matched:
            raise ValueError(f"`estimator` has the pattern {pattern!r}, which matches no converted layer.")
        for name in matched:
            found[name] = found[name] or get_estimator(value).name
    return {name: value or REPARAMETERIZATION.name for name, value in found.items()}


def check_weights(model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise ValueError for weights of the modules ``chosen`` that are not finite."""
    for name in chosen:
        for parameter_name, parameter in model.get_submodule(name)._parameters.items():
            if parameter is not None and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"`model` has NaN or infinite values in {name}.{parameter_name}: no scale can be derived from "
                    "them. Repair the checkpoint, or name the layer in `exclude_modules`."
                )


def recorded(model: nn.Module, config: BayesianConfig) -> Chosen:
    """Return the modules that a configuration records; ValueError where the model has others there."""
    modules = dict(model.named_modules())
    chosen = {}
    position = {name: number for number, name in enumerate(modules)}  # JSON has sorted the names
    for name in sorted(config.modules, key=lambda name: position.get(name, -1)):
        found_kind = _bayesian_class(model, name, modules[name]) if name in modules else (None, "")
        if name in modules and name in config.parameters:
            found_kind = _entries_class(modules[name], config.parameters[name], found_kind)
        kind, _ = parametrized(found_kind, config.parametrization)
        if kind is None or kind.__name__ != config.modules[name]:
            found = type(modules[name]).__name__ if name in modules else "no such module"
            raise ValueError(
                f"`config.bayesian` records {name!r} as {config.modules[name]}, the model has {found} there."
            )
        chosen[name] = kind
    return chosen
