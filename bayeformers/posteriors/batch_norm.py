"""Running statistics of BatchNorm layers, computed anew for weights that training never had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..forward import call
from .heads import without_labels


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """By name, the layers that predict with running statistics."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    return {name: module for name, module in found if module.track_running_stats and module.running_mean is not None}


@torch.no_grad()
def batch_norm_statistics(
    model: nn.Module, layers: Mapping[str, _BatchNorm], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """The average over batches of what the layers see, as `update_bn` of torch gives it; the model stays.

    Args:
        model: with the weights in question.
        layers: its layers by name.
        batches: inputs.

    Returns:
        Buffers by their names in the model, on the CPU.

    Raises:
        TypeError: ``batches`` can be read once only.
        ValueError: there is no batch.
    """
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be a list or a DataLoader, got {type(batches).__name__}.")
    modes = {module: module.training for module in model.modules()}
    kept = {name: ({k: b.clone() for k, b in layer._buffers.items() if b is not None}, layer.momentum)
            for name, layer in layers.items()}  # fmt: skip
    try:
        model.eval()
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # a plain average
            layer.training = True
        count = 0
        for inputs in batches:
            call(model, without_labels(model, inputs))
            count += 1
        if not count:
            raise ValueError("`batches` must hold one batch at least, got none.")
        return {
            f"{name}.{key}": buffer.detach().to("cpu", copy=True)
            for name, layer in layers.items()
            for key, buffer in layer._buffers.items()
            if buffer is not None
        }
    finally:
        for name, layer in layers.items():
            buffers, layer.momentum = kept[name]
            for key, value in buffers.items():
                getattr(layer, key).copy_(value)
        for module, training in modes.items():
            module.training = training
