"""Held draws inside `torch.compile`: what a graph needs of a draw is made before it runs and handed in.

Were the noise made inside, a graph would be of one draw: its key is text, which a compiler takes for a constant. So
traced code reads tensors in `Draw.handed` instead: the tensor's value, or its noise where gradients are asked for. They
are inputs of the graph, and one graph serves all draws. While a graph is traced, each layer hands in what it needs, and
its scope remembers that; from then on `hold` hands it in, and an optimizer's step inside of it does so again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from .noise import Draw, HandedDraw, handed_name
from .variational import Variational

_Layer = Any
"""A `BayesianModule`, which itself asks here what running code sees."""
_held: list[tuple[list[_Layer], Draw]] = []
"""The draws that are held now: of other weights, after an optimizer's step, they have other values."""
_hook: Any = None


def as_seen(layer: _Layer, name: str, draw: Draw) -> Draw | HandedDraw:
    """Return a held draw as the running code sees it.

    Args:
        layer: that holds it.
        name: of the tensor in the layer.
        draw: the draw.
    """
    return HandedDraw(layer, name, draw) if torch.compiler.is_compiling() else draw


def hand_in(layer: _Layer, name: str, kind: str) -> bool:
    """While a graph is traced: hand in one tensor of the held draw, and remember to do so for other draws.

    Args:
        layer: whose tensor.
        name: of the tensor in the layer.
        kind: "value" or "noise".

    Returns:
        True, for a compiler needs some constant.
    """
    layer.scope.handed.add(handed_name(kind, layer.specs[name]))
    with _eagerly():
        _hand_in(layer, name, kind, layer._holds[-1].draw)
    return True


hand_in._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `torch.compiler.assume_constant_result` does


@contextlib.contextmanager
def handed_in(layers: list[_Layer], draw: Draw) -> Iterator[None]:
    """Hand in what graphs of these layers are known to need of a draw that is held until exit."""
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_after_step)
    entry = layers, draw
    _hand_in_known(*entry)
    _held.append(entry)
    try:
        yield
    finally:
        _held[:] = [one for one in _held if one is not entry]


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        for layers, draw in list(_held):
            _hand_in_known(layers, draw)


def _hand_in_known(layers: list[_Layer], draw: Draw) -> None:
    for layer in layers:
        if known := layer.scope.handed:
            for name, spec in layer.specs.items():
                for kind in ("value", "noise"):
                    if handed_name(kind, spec) in known:
                        _hand_in(layer, name, kind, draw)


def _hand_in(layer: _Layer, name: str, kind: str, draw: Draw) -> None:
    loc, rho, spec = layer.get_parameter(name), layer.get_parameter(f"{name}_rho"), layer.specs[name]
    with torch.set_grad_enabled(kind == "noise"):  # the draw keeps values without gradients, and noise with them
        if kind == "noise":
            made = draw.noise(spec, loc)
        else:
            made = Variational(loc, rho, spec, draw, layer.scale_floor(name)).sample()
    setattr(draw.handed, handed_name(kind, spec), made)


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """What runs inside is no part of the graph that is being traced."""
    compiler: Any = torch.compiler
    flag = getattr(compiler, "_is_compiling_flag", False)
    try:
        compiler._is_compiling_flag = False
        yield
    finally:
        compiler._is_compiling_flag = flag
