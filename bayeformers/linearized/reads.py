"""Layers whose weights a model also reads outside their forward, where no record of their calls sees the use.

The Jacobian in such a weight would lack a part, silently. Found once for a model and a kind of inputs: in a view of it,
a weight requires a gradient only while its own layer does not run; then the outputs' graph reaches it or does not.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import Inputs, batch_size, call
from ..sampling.views import View, viewed
from .recording import examples

_KNOWN: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()
"""What was looked at and found without such layers."""


def check_reads(
    model: nn.Module, inputs: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> None:
    """No weight of ``modules`` is read outside its layer's forward.

    Raises:
        ValueError: some is.
    """
    modules = list(modules)
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    key = frozenset(map(id, modules)), names
    if key in _KNOWN.setdefault(model, set()):
        return
    found = set(read_outside(model, inputs, modules, output_of))
    if found:
        some = [name for name, module in model.named_modules() if module in found]
        raise ValueError(
            f"The model reads the weights of {some[:3]}{' and others' if len(some) > 3 else ''} outside these layers' "
            "own forward, where their Jacobians cannot be recorded: predict with method='sample', or leave such layers "
            "deterministic by `exclude_modules`."
        )
    _KNOWN[model].add(key)


def read_outside(
    model: nn.Module, inputs: Inputs, modules: Iterable[nn.Module], output_of: Callable[[Any], Tensor]
) -> list[nn.Module]:
    """Those of ``modules`` whose weights ``output_of(model(inputs))`` reads elsewhere; none where it cannot be told."""
    modules = list(modules)
    weights = {p for module in modules for p in module._parameters.values() if p is not None and p.is_floating_point()}
    if not weights:
        return []
    replaced = {weight: nn.Parameter(weight.detach()) for weight in weights}
    with viewed(model, {id(weight): own for weight, own in replaced.items()}, training=False) as view:
        if not view.is_private:
            return []
        for module in modules:
            _switch_off_inside(view, module)
        reached = _reached(view, next(examples(inputs, batch_size(inputs))), list(replaced.items()), output_of)
    return [module for module in modules if not reached.isdisjoint(module._parameters.values())]


def _switch_off_inside(view: View, module: nn.Module) -> None:
    layer = view.hookable(module)
    weights = [p for p in layer._parameters.values() if p is not None and p.is_floating_point()]

    def switch(on: bool, *_: Any) -> None:
        for weight in weights:
            weight.requires_grad_(on)

    layer.register_forward_pre_hook(functools.partial(switch, False))
    layer.register_forward_hook(functools.partial(switch, True))


def _reached(
    view: View, inputs: Inputs, weights: list[tuple[nn.Parameter, nn.Parameter]], output_of: Callable[[Any], Tensor]
) -> set[nn.Parameter]:
    """Of the model's weights those whose counterparts the outputs' graph reaches."""
    with _recording():
        try:
            outputs = output_of(call(view.model, inputs))
        except Exception:  # what cannot run on one example alone is left to the caller's own pass
            return set()
        if not outputs.requires_grad:
            return set()
        grads = torch.autograd.grad(outputs.sum(), [counterpart for _, counterpart in weights], allow_unused=True)
    return {weight for (weight, _), grad in zip(weights, grads, strict=True) if grad is not None}


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
