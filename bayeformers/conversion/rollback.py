"""A change of a model is whole or did not happen, whatever interrupts it: an error, or a notebook's stop button."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, values: Iterable[Tensor] = ()) -> Iterator[None]:
    """``model`` comes back as it was if the body is left by any exception, a KeyboardInterrupt included.

    Args:
        model: whose modules' classes, attributes and `requires_grad` flags may change, and its configuration.
        values: tensors that are written in place; others must not be.
    """
    before = _Before(model, values)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class _Before:
    """Containers are kept with what they held: handles of hooks, and others, refer to the container itself."""

    def __init__(self, model: nn.Module, values: Iterable[Tensor]) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]
        attributes = {id(value): value for _, _, state in self._modules for value in state.values()}
        self._containers: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in attributes.values() if _is_container(value)
        ]
        configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
        records = [value for value in attributes.values() if dataclasses.is_dataclass(value)]
        objects = [value for value in (*configs.values(), *records) if hasattr(value, "__dict__")]
        self._containers += [(vars(value), dict(vars(value))) for value in objects]

    def restore(self) -> None:
        for module, kind, state in self._modules:
            object.__setattr__(module, "__class__", kind)
            _refill(vars(module), state)
        for container, content in self._containers:
            _refill(container, content)
        for parameter, flag in self._flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | set) and hasattr(value, "copy")


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)
