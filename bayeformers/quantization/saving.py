"""What `QuantizedPosterior.save` writes: one file of tensors, and the model's configuration."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion.surgery import padding_rows
from ..storage import folder, write
from .install import Weight
from .noise import Noise
from .report import LayerReport

FILE, KIND = "quantized.safetensors", "quantized"


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    weights: Sequence[Weight],
    noise: Noise,
    report: Iterable[LayerReport],
    **head: Any,
) -> None:
    """Write ``quantized.safetensors``, whole or not at all, and the model's ``config.json``.

    Args:
        directory: the folder, which is made if it is not there.
        model: with its INT8 layers.
        weights: its INT8 weights.
        noise: of the draws.
        report: the rows of the quantisation's report.
        head: what is known of the model's outputs, JSON-able.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder(directory)
    meta = {
        "model": type(model).__name__,
        "weights": [
            {
                "name": w.name,
                "owners": w.owners,
                "arithmetic": w.arithmetic,
                "dtype": str(w.dtype).removeprefix("torch."),
            }
            for w in weights
        ],
        "noise": {"kind": noise.kind, "meta": noise.meta()},
        "padding": padding_rows(model, [name for name, _ in model.named_modules()]),
        "report": [asdict(row) for row in report],
        **head,
    }
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(path)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(path)
    write(path / FILE, all_tensors(model, weights, noise), meta, kind=KIND)


def all_tensors(model: nn.Module, weights: Iterable[Weight], noise: Noise) -> dict[str, Tensor]:
    """Return all tensors that the file holds, by name.

    Args:
        model: with its INT8 layers.
        weights: its INT8 weights, each once.
        noise: of the draws.
    """
    tensors = {f"noise:{name}": value for name, value in noise.tensors().items()}
    for weight in weights:
        tensors |= {f"codes:{weight.name}": weight.codes.codes, f"step:{weight.name}": weight.codes.step}
    tensors |= {f"float:{name}": value for name, value in floats(model).items()}
    return tensors | {f"buffer:{name}": value for name, value in buffers(model).items()}


def floats(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that stay float, each once."""
    return {name: value for name, value in model.named_parameters() if not name.endswith("weight_step")}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """All but codes, also those that a state dict leaves out: a model in 16 bits may have them in 32."""
    return {name: value for name, value in model.named_buffers() if not name.endswith("weight_codes")}
