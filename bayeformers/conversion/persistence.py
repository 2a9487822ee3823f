"""Which tensors of a conversion a checkpoint brings back: transformers renames weights, wrappers save in own ways.

transformers' table knows the model's own weights. A scale beside one of them is renamed by the same patterns, as text,
split and joined as the weight would be; a pattern that ends with the weight's name, or an operation that needs all its
parts, may not find it on the way back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..nn.base import BayesianModule
from ..nn.draws import posterior_mean
from .rank1 import shapes

Shapes = Mapping[str, tuple[int, ...]]
_FLOOR = "_scale_floor"
ENDINGS = ("_rho", "_prior_centre", "_prior_scale", _FLOOR)
"""Of what a conversion adds beside a weight: what has one of them is split and joined with its like."""

_SAVING = ("save_pretrained", "save", "push_to_hub")
_WHOLE = "Save `model.state_dict()`, and load it into a model with the same adapters after the same `to_bayesian` call."


def without_lost(
    model: nn.Module, chosen: Mapping[str, type[BayesianModule]], *, is_multiplicative: bool, is_whole: bool
) -> tuple[dict[str, type[BayesianModule]], dict[str, str]]:
    """Return the layers whose scales a checkpoint brings back, and the others with the reason.

    Args:
        model: to be converted.
        chosen: the modules to convert with their Bayesian class.
        is_multiplicative: whether the scales are multiplicative, so that their floors are saved too.
        is_whole: whether the layers are all that there are, not a choice of the user's, who would miss one.

    Raises:
        ValueError: a layer of the user's choice is lost; or all are; or the floors of multiplicative scales are.
    """
    lost = lost_names(model, _added(model, chosen, is_multiplicative))
    floors = sorted(name for name in lost if name.endswith(_FLOOR) and name.removesuffix(_FLOOR) + "_rho" not in lost)
    if floors:
        raise ValueError(
            f'`scale`="multiplicative" could not be saved: transformers joins weights of {type(model).__name__} in its '
            f"files, and the floors of their scales are numbers ({floors[0]!r}, {len(floors)} in all). Take "
            '"additive", or name these layers in `exclude_modules`.'
        )
    layers = {name for name in chosen if any(key.rpartition(".")[0] == name for key in lost)}
    if layers and (not is_whole or layers == set(chosen)):
        raise ValueError(
            f"The scales of {sorted(layers)[:3]} ({len(layers)}) could not be saved: transformers renames or joins "
            f"weights of {type(model).__name__} in its files, and these would not come back. Name all layers that it "
            "joins (as query, key and value), or none."
        )
    kept = {name: kind for name, kind in chosen.items() if name not in layers}
    return kept, dict.fromkeys(sorted(layers), "its scale would not come back from transformers' renaming of weights")


def _added(
    model: nn.Module, chosen: Mapping[str, type[BayesianModule]], is_multiplicative: bool
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the conversion may add."""
    found: dict[str, tuple[int, ...]] = {}
    for name, kind in chosen.items():
        for key, shape in shapes(model.get_submodule(name), kind).items():
            path = f"{name}.{key}".lstrip(".")
            found |= {f"{path}{ending}": shape for ending in ENDINGS if ending != _FLOOR}
            if is_multiplicative:
                found[f"{path}{_FLOOR}"] = ()
    return found


def lost_names(model: nn.Module, added: Shapes) -> set[str]:
    """Return those of the tensors ``added`` (name -> shape) that a checkpoint would not bring back as they were.

    Every name is sent through the renaming and back, and what is split or joined as a tensor without values.
    """
    if not isinstance(model, PreTrainedModel) or not _used_for_saving(model):
        return set()
    present: dict[str, Any] = {**dict.fromkeys(model.state_dict(), True), **dict.fromkeys(added, True)}
    saving = [transform.reverse_transform() for transform in _used_for_saving(model)[::-1]]
    out = {
        name: rename_source_key(name, *_kinds(saving), reverse=True) for name in sorted(present, key=dot_natural_key)
    }
    names: dict[str, list[str]] = {}
    for name, (target, pattern) in out.items():
        if pattern is None:
            names.setdefault(target, []).append(name)
    lost, joined = {name for name in added if out[name][1] is not None}, set[str]()
    loading = _kinds(get_model_conversion_mapping(model))
    for target in sorted(names, key=dot_natural_key):
        back, pattern = _loaded(model, target, loading, present)
        if pattern is not None:
            joined |= set(names[target])
        elif len(names[target]) > 1 or [back] != names[target]:
            lost |= set(names[target]) & added.keys()
    return (lost | (joined & added.keys())) - _return_joined(model, {n: added[n] for n in added if n in lost | joined})


def _return_joined(model: PreTrainedModel, added: Shapes) -> set[str]:
    """Those that come back in their own shape from the operations that take them apart or together."""
    found: set[str] = set()
    for ending in ENDINGS:
        group = {name: torch.empty(shape, device="meta") for name, shape in added.items() if name.endswith(ending)}
        try:
            returned = _read(model, revert_weight_conversion(model, group), dict(added)) if group else {}
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError):
            continue  # as of scalars, which nothing can join
        found |= {name for name, value in group.items() if name in returned and returned[name].shape == value.shape}
    return found


def _read(model: PreTrainedModel, saved: dict[str, Tensor], added: dict[str, Any]) -> dict[str, Tensor]:
    """As `from_pretrained` names, splits and joins a file's tensors."""
    renamings, converters = _kinds(get_model_conversion_mapping(model))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, Any] = {}
    for key in sorted(saved, key=dot_natural_key):
        name, pattern = _loaded(model, key, (renamings, converters), added)
        new = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
        collected.setdefault(name, new).add_tensor(name, key, key if pattern is None else pattern, saved[key])
    found = {}
    for name, transform in collected.items():
        for target, value in transform.convert(name, model=model, config=model.config).items():
            found[target] = value[0] if isinstance(value, list) else value
    return found


def _loaded(
    model: PreTrainedModel,
    key: str,
    transforms: tuple[list[WeightRenaming], list[WeightConverter]],
    present: dict[str, Any],
) -> tuple[str, str | None]:
    """The name that a file's entry has in the model, and the pattern by which it is split or joined."""
    name, pattern = rename_source_key(key, *transforms, model.base_model_prefix, present)
    if name not in present and key in present:
        return rename_source_key(key, [], [], model.base_model_prefix, present)
    return name, pattern


def _used_for_saving(model: PreTrainedModel) -> list[WeightTransform]:
    """What `save_pretrained` reverts: what loading used, or the table of a model that was made from scratch."""
    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return list(used)
    table = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in table if not isinstance(transform, PrefixChange)]


def _kinds(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def told_of_own_save(model: nn.Module) -> str | None:
    """Return what to say of a converted ``model`` if what it saves would be loaded without its posterior.

    A model of transformers, and one that is saved by its `state_dict`, have no such trouble: None. Of adapters see
    `told_of_adapters`.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return None
    how = [name for name in _SAVING if callable(getattr(model, name, None))]
    if not how:
        return None
    kind = type(model).__name__
    inner = next((name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    remedy = "Save its `state_dict()`, and load it into a model after the same `to_bayesian` call."
    if inner is not None:
        remedy = (
            f"Convert the transformers model inside, `model.get_submodule({inner!r})`: what that saves is read by "
            "`bayeformers.from_pretrained`, and can be put in its place."
        )
    return (
        f"{kind} was converted as a whole, but its own `{how[0]}` does not record that: what it saves is loaded "
        f"without the posterior. {remedy}"
    )


def told_of_adapters(model: nn.Module) -> str | None:
    """Return what to say of a converted model with adapters of transformers' own `add_adapter`; None: it has none.

    It saves these alone. Of a `PeftModel` the posterior is saved beside the adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        kind = type(model).__name__
        return f"{kind}: with adapters, its own `save_pretrained` saves these alone, without the posterior. {_WHOLE}"
    return None


def peft_state(model: Any, own: dict[str, Any], adapter: str) -> dict[str, Tensor]:
    """Return what PEFT saves of an adapter, by the names that it gives them: tensors of ``own``, or computed ones.

    Args:
        model: a PEFT model whose layers have become Bayesian.
        own: ``model.state_dict(keep_vars=True)``, so that a tensor is told by its identity.
        adapter: the adapter's name in the model.
    """
    from peft import get_peft_model_state_dict  # an extra

    with torch.no_grad(), posterior_mean(model):
        state = get_peft_model_state_dict(model, own, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def saved_by_peft(model: nn.Module, own: dict[str, Any]) -> set[int]:
    """The ids of the tensors that PEFT saves, of all adapters; see :func:`peft_state`."""
    return {id(t) for adapter in getattr(model, "peft_config", ()) for t in peft_state(model, own, adapter).values()}
