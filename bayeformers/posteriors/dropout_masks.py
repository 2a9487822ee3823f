"""Which units a draw of dropout keeps: a pure function of a key and of an element's place, the same on every device.

Each element's number comes of a hash of its coordinates, not of a stream: what is drawn for a token depends neither on
the batch's length nor on the row it stands in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..forward import tensors_in

__all__ = ["keeps", "mixed", "row_words", "words"]

_MULTIPLIER = 0x045D9F3B  # of the 32-bit finalizer; products stay below 2^63
_LOW = 0xFFFFFFFF
_FACTORS = (0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D)
_ATTENTION = "attention_mask"


def words(key: str, length: int, device: torch.device) -> Tensor:
    """Return random words of 32 bits, in int64: word i is a function of ``key`` and i alone.

    Args:
        key: whatever the words should depend on.
        length: how many.
        device: where they are made, with the same values everywhere.
    """
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return mixed((mixed(torch.arange(length, device=device) + 1) + start) & _LOW)


def keeps(rate: float, axes: Sequence[Tensor | None]) -> Tensor:
    """Return which elements stay, each with probability 1 - ``rate``: bool, one axis per entry.

    Args:
        rate: the probability of an element to be dropped.
        axes: of every axis the words of its places, 32 bits each; None for an axis along which all share their fate.
    """
    total = torch.zeros((), dtype=torch.int64)
    for axis, own in enumerate(axes):
        if own is not None:
            total = total.to(own.device) ^ own.reshape(-1, *[1] * (len(axes) - axis - 1))
    return mixed(total) >= round(rate * 2**32)


def mixed(values: Tensor) -> Tensor:
    """Return the finalizer of a 32-bit hash, a bijection of 0 .. 2^32 - 1; in int64, where nothing overflows."""
    for _ in range(2):
        values = ((values ^ (values >> 16)) * _MULTIPLIER) & _LOW
    return values ^ (values >> 16)


def row_words(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return a word of 32 bits for each example of a batch, of what it holds; None for a batch without a tensor.

    Padding does not count, where the batch has an attention mask that tells it.

    Args:
        inputs: what the model is called with, by name.
    """
    tensors = [(name, t) for name, value in inputs.items() for t in tensors_in(value) if t.ndim]
    if not tensors:
        return None
    size = len(tensors[0][1])
    total = torch.zeros(size, dtype=torch.int64, device=tensors[0][1].device)
    for name, tensor in tensors:
        if len(tensor) == size and not _is_mask(name, tensor):
            total = total + _content(tensor, _attended(inputs, name, tensor)).to(total.device)
    return mixed((total ^ (total >> 32)) & _LOW)


def _is_mask(name: str, tensor: Tensor) -> bool:
    return name.endswith(_ATTENTION) and tensor.ndim == 2


def _attended(inputs: Mapping[str, Any], name: str, tensor: Tensor) -> Tensor | None:
    mask = inputs.get(f"decoder_{_ATTENTION}" if name.startswith("decoder_") else _ATTENTION)
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and tensor.shape[:2] == mask.shape
    return mask.bool() if fits else None  # type: ignore[union-attr]


def _content(tensor: Tensor, attended: Tensor | None) -> Tensor:
    """A number per row, (B,): of its values and of their places among those that count."""
    values = tensor.detach()
    if values.is_floating_point():
        values = values.float().contiguous().view(torch.int32)
    values = values.to(torch.int64).reshape(len(tensor), tensor.shape[1] if tensor.ndim > 1 else 1, -1)
    places = torch.arange(values.shape[1], device=values.device).expand(values.shape[:2])
    if attended is not None:
        places = attended.long().cumsum(1)
    inner = torch.arange(values.shape[2], device=values.device)
    mixed = (values + (places[..., None] * values.shape[2] + inner) * _FACTORS[0]) * _FACTORS[1]
    mixed = (mixed ^ (mixed >> 29)) * _FACTORS[0]  # sums and products wrap around, as they should
    mixed = mixed ^ (mixed >> 32)
    return mixed.sum((1, 2)) if attended is None else (mixed.sum(2) * attended).sum(1)
