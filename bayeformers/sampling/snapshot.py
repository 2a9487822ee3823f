"""Comparable snapshots: of nested arguments, and of all that a module reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) | {"forward"}
MAX_DEPTH = 3
_ATOMS = frozenset({bool, int, float, str, torch.dtype, torch.device, torch.Size, type(None)})


class Refused(Exception):
    """A value or a module that cannot be compared with itself later."""


def flatten(value: Any) -> list[Any]:
    """Leaves of nested tuples, lists, dicts and model outputs, with one marker per container; else it is `Refused`."""
    # an allow-list, not `torch.utils._pytree`: a mutable cache may be registered there
    leaves: list[Any] = []
    _flatten_into(leaves, value)
    return leaves


def _flatten_into(leaves: list[Any], value: Any) -> None:
    kind = type(value)
    is_tensor = kind in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_inference()
    if is_tensor or kind in _ATOMS:
        leaves.append(value)
    elif kind in (tuple, list):
        leaves.append((kind, len(value)))
        for item in value:
            _flatten_into(leaves, item)
    elif kind is dict or isinstance(value, ModelOutput):
        leaves.append((kind, tuple(value)))
        for item in value.values():
            _flatten_into(leaves, item)
    else:
        raise Refused(f"{kind.__name__} values cannot be compared")


def rebuild(value: Any) -> Any:
    """Fresh containers around the same tensors, for the caller may edit a list or a dict."""
    if type(value) in (tuple, list):
        return type(value)(map(rebuild, value))
    if type(value) is dict:
        return {key: rebuild(item) for key, item in value.items()}
    if isinstance(value, ModelOutput):
        return type(value)(**{key: rebuild(item) for key, item in value.items()})
    return value


def module_state(module: nn.Module) -> list[Any]:
    """All that ``forward`` may read besides its arguments: parameters, buffers and attributes of every submodule."""
    state: list[Any] = []
    for depth, inner in enumerate(module.modules()):
        if inner.training:
            raise Refused(f"{type(inner).__name__} is in training mode")
        # a reused output would skip the hook
        if depth and (inner._forward_hooks or inner._forward_pre_hooks):
            raise Refused(f"{type(inner).__name__} has a forward hook")
        for tensor in (*inner._parameters.values(), *inner._buffers.values()):
            _observe(state, tensor)
        for name, value in vars(inner).items():
            if name not in TORCH_ATTRIBUTES:
                _observe(state, value)
    return state


def _observe(state: list[Any], value: Any, depth: int = MAX_DEPTH) -> None:
    state.append(value)
    if isinstance(value, Tensor):
        try:
            state += (value._version, value.data_ptr())
        except RuntimeError as error:  # sparse, sharded, or made in inference mode
            raise Refused("a tensor without version or storage cannot be compared") from error
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _observe(state, item, depth - 1)


def unchanged(then: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two states of one module are the same: identical objects, or equal numbers and strings."""
    return len(then) == len(now) and all(
        a is b or (type(a) is type(b) and type(a) in _ATOMS and a == b) for a, b in zip(then, now, strict=True)
    )


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype, device, layout in memory, and in every element; NaN differs from NaN."""
    alike = (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
    return alike and torch.equal(a, b)


def versions(leaves: Iterable[Any]) -> list[int | None]:
    """How often each tensor was changed in place, its views included; None for other leaves."""
    return [leaf._version if isinstance(leaf, Tensor) else None for leaf in leaves]


def tensors_by_id(value: Any) -> dict[int, Tensor]:
    """The tensors in ``value`` by ``id``; none of them where it holds a value that cannot be compared."""
    try:
        leaves = flatten(value)
    except Refused:
        return {}
    return {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
