"""Training draws whose noise and signs are given, and a layer's output under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayeformers.nn.noise import Draw, TensorSpec


class GivenNoise(Draw):
    """A training draw whose noise and signs are given; signs not given are fair, as ever."""

    def __init__(self, noise: dict[str, Tensor], signs: Callable[..., Tensor] | None = None) -> None:
        super().__init__(7, keep=False)
        self.given, self.given_signs = noise, signs

    def noise(self, spec: TensorSpec, like: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.given[spec.name] if rows is None else self.given[spec.name][rows]

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        return (self.given_signs or super().signs)(spec, axis, shape, device)


def output(layer: Any, x: Tensor, draw: Draw) -> Tensor:
    """Of a training forward in that draw."""
    layer.scope.running = draw
    try:
        result: Tensor = layer.train()(x)
    finally:
        layer.scope.running = None
    return result
