"""`generate` in `train()`: one draw for the whole call, its encoder, beams and cache included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from .draws import bayesian_modules, hold, say_once
from .scope import fresh_key
from .variational import Draw

GENERATE: Final = (
    "%s generates in train(): one draw of the weights serves the whole call. Call `model.eval()` for the posterior "
    "mean, or choose the draw in `with fixed_draw(model, index)`."
)
_PREFIX = "generate"


class OneDraw:
    """Stands in for a module's ``generate``; as itself where no layer would draw, that is in `eval()` or a held draw.

    Without it every token would be another network's, over the keys and values of the ones before.
    """

    def __init__(self, module: nn.Module, name: str, own: Callable[..., Any] | None) -> None:
        self._module, self._name, self.own = module, name, own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """What it stands in for; `inspect.signature` reads it."""
        return self.own or getattr(type(self._module), self._name).__get__(self._module)

    @property
    def __name__(self) -> str:
        return self._name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = [] if torch.compiler.is_compiling() else list(_drawing(self._module))
        if not layers:
            return self.__wrapped__(*args, **kwargs)
        say_once(layers[0].scope, GENERATE, self._module)
        with hold(self._module, Draw(fresh_key()), layers):
            return self.__wrapped__(*args, **kwargs)


def hold_while_generating(model: nn.Module) -> None:
    """Every module of ``model`` that generates does so under one draw."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) or not callable(getattr(type(module), _PREFIX, None)):
            continue
        for name in dir(type(module)):
            if name.startswith(_PREFIX) and callable(getattr(type(module), name)):
                vars(module)[name] = OneDraw(module, name, vars(module).get(name))


def release_generating(model: nn.Module) -> None:
    """Undo :func:`hold_while_generating`."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, OneDraw):
                if value.own is None:
                    del vars(module)[name]
                else:
                    vars(module)[name] = value.own


def _drawing(model: nn.Module) -> Iterator[Any]:
    """Layers that would take a training draw of their own."""
    for layer in bayesian_modules(model).values():
        if layer.training and layer.draw is None and layer.scope.running is None:
            yield layer
