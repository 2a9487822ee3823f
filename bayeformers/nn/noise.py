"""Stateless standard-normal noise: a pure function of (seed, draw index, tensor name, element).

The same key gives the same values for every batch, rank, token of `generate` and after a reload, whatever was drawn
before. Values agree between devices of one type; CPU and GPU streams may differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sampling.generators import NOISE_VERSION, keyed_generator

_INT32 = 0xFFFFFFFF


def noise_key(seed: int, index: int, name: str) -> int:
    """64-bit key of one tensor's noise in one draw."""
    digest = hashlib.blake2b(f"{seed}/{index}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def normal(key: int, shape: Sequence[int], device: torch.device, version: int = NOISE_VERSION) -> Tensor:
    """N(0, 1) in float32 of the given shape, from a generator that is seeded with ``key`` and used once."""
    generator = keyed_generator(key, device, version)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)


@torch.library.custom_op("bayeformers::normal", mutates_args=())
def traced_normal(seed: str, index: int, name: str, shape: list[int], device: torch.device, version: int) -> Tensor:
    """:func:`normal` of :func:`noise_key`, opaque to a compiler; the seed as text, for it may have over 63 bits."""
    return normal(noise_key(int(seed), index, name), shape, device, version)


@traced_normal.register_fake
def _(seed: str, index: int, name: str, shape: list[int], device: torch.device, version: int) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.float32)


@torch.library.custom_op("bayeformers::noise_key", mutates_args=())
def traced_key(seed: str, index: int, name: str, device: torch.device) -> Tensor:
    """:func:`noise_key` as :func:`normal_rows` takes it from a compiler: two int32 values (2,)."""
    key = noise_key(int(seed), index, name)
    return torch.tensor([_signed(key & _INT32), _signed(key >> 32)], dtype=torch.int32, device=device)


@traced_key.register_fake
def _(seed: str, index: int, name: str, device: torch.device) -> Tensor:
    return torch.empty(2, device=device, dtype=torch.int32)


def signs(key: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Independent fair signs, -1 or 1, in float32 of the given shape."""
    generator = keyed_generator(key, device)
    return torch.randint(2, tuple(shape), generator=generator, device=device, dtype=torch.float32).mul_(2).sub_(1)


def normal_rows(key: int | Tensor, rows: Tensor, width: int) -> Tensor:
    """N(0, 1) of the given rows of a table, without the rest of the table: element (r, c) hashes (key, r, c).

    Two rounds of a 32-bit mixer (Wellons' lowbias32) with 64 bits of state per row, then the inverse normal CDF of the
    upper 24 bits; |values| < 5.3. Element by element, so a row's noise does not depend on the other rows asked for.

    Args:
        key: from :func:`noise_key`, or two int32 values (2,) as a tensor.
        rows: row numbers, any integer dtype.
        width: columns of the table.

    Shape: ``rows`` (n,) -> (n, width), float32.
    """
    device = rows.device
    low, high = (key[0], key[1]) if isinstance(key, Tensor) else (_signed(key & _INT32), _signed(key >> 32 & _INT32))
    row = rows.to(torch.int32)
    first, second = _mix(row ^ low), _mix(_mix(row ^ high) ^ low)
    column = torch.arange(width, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B9))
    bits = _mix(_mix(first[:, None] + column).bitwise_xor_(second[:, None]))
    uniform = ((bits >> 8).to(torch.float32) + 0.5) * 2.0**-23  # exact in float32, strictly inside (-1, 1)
    return torch.erfinv(uniform) * math.sqrt(2.0)


def _mix(x: Tensor) -> Tensor:
    """lowbias32: a bijection of 32-bit integers whose every input bit flips each output bit about half of the time."""
    x = x ^ ((x >> 16) & 0xFFFF)  # the mask makes the shift of a signed integer logical
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
