"""What a model's output and a batch hold, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "attended_positions", "labels_of", "logits_of", "output_field", "wide"]

IGNORED = -100
"""The label that counts for nothing."""

_POSITIONS = {"logits": 0, "start_logits": 0, "end_logits": 1}  # in a tuple


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in the wider dtype that it has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def output_field(output: Any, name: str) -> Any:
    """A field of a model's output, which is a ModelOutput, a mapping, a tuple, a tensor or an object; None without."""
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, Tensor):
        return output if name == "logits" else None
    if isinstance(output, tuple) and (position := _POSITIONS.get(name)) is not None:
        return output[position] if len(output) > position else None
    return getattr(output, name, None)


def logits_of(output: Any, name: str = "logits") -> Tensor:
    """Find the logits in a model's output.

    Returns:
        The logits, in float32 or wider.

    Raises:
        ValueError: it has none.
    """
    logits = output_field(output, name)
    if logits is None and name == "logits":
        logits = output_field(output, "logits_per_image")  # zero-shot classification of images by texts
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise ValueError(f"`output` needs `{name}`, got {_description(output)}.")
    return wide(logits)


def labels_of(batch: Mapping[str, Any], name: str = "labels") -> Tensor:
    """Find a batch's labels.

    Returns:
        The tensor of that name.

    Raises:
        ValueError: they are missing or no tensor.
    """
    labels = batch.get(name)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"`{name}` must be a tensor in every training batch, got {type(labels).__name__}; "
            f"the batch has {sorted(batch)}."
        )
    return labels


def attended_positions(batch: Any, length: int, name: str = "attention_mask") -> Tensor | None:
    """The attention mask (B, T) as bool, if there is one for sequences of ``length``."""
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length else None


def _description(output: Any) -> str:
    return f"{type(output).__name__} with {list(output)}" if isinstance(output, Mapping) else type(output).__name__
