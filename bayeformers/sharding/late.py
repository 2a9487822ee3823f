"""Conversions of a model that FSDP2 has sharded already: classes, and the scales that come or go."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..nn.base import bayesian_modules
from ..processes.dtensors import is_split, reshard, whole
from .fsdp import add_group, drop_removed, is_sharded, separate_scales, states

F = TypeVar("F", bound=Callable[..., nn.Module])


def keeps_sharding(function: F) -> F:
    """Let ``function(model, ...)``, which changes the classes and tensors of layers, do so in a sharded model too."""

    @functools.wraps(function)
    def on_parts(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not isinstance(model, nn.Module) or not is_sharded(model):
            return function(model, *args, **kwargs)
        reshard(model)
        with _original_classes(model):
            result = function(model, *args, **kwargs)
        drop_removed(model)
        _adopt_scales(model)
        separate_scales(model)
        return result

    return cast(F, on_parts)


@contextlib.contextmanager
def _original_classes(model: nn.Module) -> Iterator[None]:
    """Inside, modules that `fully_shard` was called on have the class that they had; afterwards FSDP2's of what it is.

    FSDP2 makes a subclass, as a conversion does, and a layer is found by its exact class.
    """
    from torch.distributed.fsdp import FSDPModule

    changed: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in changed:
        module.__class__ = next(kind for kind in type(module).__mro__[1:] if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        for module in changed:
            module.__class__ = _of_fsdp(cast(Any, type(module)))


@functools.cache
def _of_fsdp(kind: type[nn.Module]) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    def __deepcopy__(self: Any, memo: Any) -> Any:
        raise AssertionError("FSDP does not support deepcopy. Please use state dict for serialization.")

    return cast("type[nn.Module]", type(f"FSDP{kind.__name__}", (FSDPModule, kind), {"__deepcopy__": __deepcopy__}))


@torch.no_grad()
def _adopt_scales(model: nn.Module) -> None:
    """Let FSDP2 gather and free new scales along with their means: one group for each of its own, made one by one."""
    owners: dict[int, list[tuple[Any, str]]] = {}
    for layer in bayesian_modules(model).values():
        for name in layer.specs:
            owners.setdefault(id(layer.get_parameter(name)), []).append((layer, f"{name}_rho"))
    for state in list(states(model)):
        for group in list(state._fsdp_param_groups):
            own = [owners[id(p.sharded_param)] for p in group.fsdp_params if id(p.sharded_param) in owners]
            known = {id(p.sharded_param) for one in state._fsdp_param_groups for p in one.fsdp_params}
            fresh = [o for o in own if is_split(rho := o[0][0].get_parameter(o[0][1])) and id(rho) not in known]
            gathered = [_gathered(one) for one in fresh]
            if gathered:
                add_group(state, group, gathered)


def _gathered(owners: list[tuple[Any, str]]) -> nn.Parameter:
    """A scale whole, in every layer that it belongs to."""
    layer, name = owners[0]
    split = layer.get_parameter(name)
    rho = nn.Parameter(whole(split), requires_grad=split.requires_grad)
    for other, key in owners:
        other._parameters[key] = rho
    return rho
