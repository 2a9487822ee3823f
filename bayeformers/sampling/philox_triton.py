"""The kernel of :mod:`.philox` for CUDA: noise in one pass over its memory. Imported only where Triton is installed."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

_PER_PROGRAM = 64  # blocks of Philox, each of 16 elements


def normal(
    out: Tensor, words: Tensor, tables: tuple[Tensor, Tensor], tail: int, rest_bits: int, fine_bits: int
) -> Tensor:
    """Return ``out`` (n,), float32, filled with the first elements of a key's noise.

    Args:
        out: of a CUDA device, as the other tensors are.
        words: of the key (2,), int64.
        tables: means of the cells and of the tail's cells.
        tail: see :mod:`.philox`, as for the rest.
        rest_bits: of an element of the tails.
        fine_bits: of a cell of the tails.
    """
    if out.numel():
        grid = (triton.cdiv(out.numel(), 16 * _PER_PROGRAM),)
        _normal[grid](
            out,
            *tables,
            words,
            out.numel(),
            tail=tail,
            rest_bits=rest_bits,
            fine_bits=fine_bits,
            per_program=_PER_PROGRAM,
        )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _normal(
    out: Any,
    table: Any,
    fine: Any,
    key: Any,
    count: Any,
    tail: tl.constexpr,
    rest_bits: tl.constexpr,
    fine_bits: tl.constexpr,
    per_program: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64) * per_program + tl.arange(0, per_program)
    key0, key1 = tl.load(key).to(tl.uint64, bitcast=True), tl.load(key + 1).to(tl.uint64, bitcast=True)
    counter = (block + 1).to(tl.uint64)
    zero = counter ^ counter
    word0, word1, word2, word3 = philox_impl(counter, zero, zero, zero, key0, key1, 10)
    for place in tl.static_range(16):
        if place < 4:
            word = word0
        elif place < 8:
            word = word1
        elif place < 12:
            word = word2
        else:
            word = word3
        cells = ((word >> (16 * (place % 4))) & 0xFFFF).to(tl.int32)
        elements = block * 16 + place
        values = _looked_up(cells, elements, key0, table, fine, tail, rest_bits, fine_bits)
        tl.store(out + elements, values, mask=elements < count)


@triton.jit  # type: ignore[untyped-decorator]
def _looked_up(
    cells: Any,
    elements: Any,
    key: Any,
    table: Any,
    fine: Any,
    tail: tl.constexpr,
    rest_bits: tl.constexpr,
    fine_bits: tl.constexpr,
) -> Any:
    x = (elements + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    rest = ((x ^ (x >> 31)) >> (64 - rest_bits)).to(tl.int32)
    is_low = cells < tail
    outer = tl.where(is_low, cells, 0xFFFF - cells)
    is_tail = outer < tail
    half_places = 2 * ((tl.where(is_tail, outer, 0) << rest_bits) | rest) + 1
    number = (half_places.to(tl.float32).to(tl.int32, bitcast=True) >> (23 - fine_bits)) - (127 << fine_bits)
    value = tl.load(fine + number, mask=is_tail, other=0.0)
    return tl.where(is_tail, tl.where(is_low, value, -value), tl.load(table + cells))
