"""Standard normal noise, version 3: each element a function of (key, element), the same on every device, in any part.

Element i takes 16 bits of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): block
b = i // 16 is the Philox function of the counter (b + 1, 0, 0, 0), its four words are read from their lowest bits on.
The bits j give the mean of the normal between its quantiles j / 2^16 and (j + 1) / 2^16. In the 256 outermost cells of
either side, |value| > 2.66, 15 bits more of splitmix64 (Steele et al. 2014) choose a finer cell, down to a probability
of 2^-31. So |value| < 6.3, the distribution function is right to 2^-17, and no value is rounded differently anywhere:
there is nothing but integers and two tables.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**17
"""Elements that are made at once on a CPU: all that is computed on the way stays in cache."""

PER_PHILOX = 16
"""Elements of one Philox block: four words of 64 bits."""

TAIL = 256
"""Outermost cells of each side that are divided further."""

REST_BITS, FINE_BITS = 15, 10
"""More bits of an element of the tails; bits of a cell in each power of two there."""

_CPU = torch.device("cpu")
_SMALL = 2**13  # up to here NumPy looks values up faster
_PART = 2**20
_CELLS, _MASK = 2**16, 2**32 - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # Philox4x64 of Random123
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64


def key_of(text: str) -> int:
    """Return a key of 128 bits, so that no two of any number of tensors and draws share their noise."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def normal(key: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return N(0, 1) in float32, element by element a function of ``key`` and of its place in the flattened tensor.

    Args:
        key: 128 bits.
        shape: of the result.
        device: of the result; its type plays no part in the values.
    """
    count = math.prod(shape)
    if device.type == "cpu":
        return normal_range(key, 0, count).view(shape)
    if device.type == "cuda" and (kernel := _kernel()) is not None:
        value: Tensor = kernel(
            torch.empty(count, device=device), words_of(key, device), tables(device), TAIL, REST_BITS, FINE_BITS
        )
        return value.view(shape)
    out = torch.empty(count, device=device)
    for first in range(0, count, _PART):  # some hundred times the memory of a part is taken on the way
        part = out[first : first + _PART]
        row = torch.tensor([first // _PART], device=device)
        part.copy_(traced_rows(words_of(key, device), row, _PART)[0, : len(part)])
    return out.view(shape)


def signs(key: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return independent fair signs, -1 or 1, in float32: one bit each of the same words.

    Args:
        key: 128 bits, of these signs alone.
        shape: of the result.
        device: of the result; its type plays no part in the values.
    """
    count = math.prod(shape)
    if device.type == "cpu":
        own = _seeded(key, 0)
        raw = own.random_raw(-(-count // 64)).view(np.uint8)
        bits = torch.from_numpy(np.unpackbits(raw, count=count, bitorder="little"))
    else:
        blocks_needed = torch.arange(1, 1 - (-count // 256), device=device)
        words = torch.stack(philox(blocks_needed, words_of(key, device)), -1)[..., None]
        bits = (words >> torch.arange(64, device=device) & 1).flatten()[:count]
    return bits.to(torch.float32).mul_(2).sub_(1).view(shape)


def normal_range(key: int, start: int, stop: int) -> Tensor:
    """Return elements ``start`` to ``stop`` of a tensor's noise, on the CPU.

    Args:
        key: 128 bits.
        start: first element in the flattened tensor.
        stop: one after the last.

    Returns:
        (stop - start,), float32.
    """
    if stop - start <= _SMALL:
        first = start - start % PER_PHILOX
        return torch.from_numpy(_looked_up(_cells(key, first, stop - first), first, key))[start - first :]
    out = torch.empty(stop - start)
    for part, eps in blocks(key, start, stop, out):
        if eps.data_ptr() != out[part].data_ptr():
            out[part] = eps
    return out


def blocks(key: int, start: int, stop: int, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the same in blocks of at most `BLOCK` elements.

    Args:
        key: 128 bits.
        start: first element in the flattened tensor.
        stop: one after the last.
        out: memory of them all (stop - start,); None: all blocks take the same memory, one after the other.

    Yields:
        Where the block lies in the range, and its noise.
    """
    aligned = start - start % PER_PHILOX
    memory = torch.empty(min(BLOCK, stop - aligned)) if out is None or start != aligned else None
    numbers = np.empty(min(BLOCK, stop - aligned), dtype=np.int32)  # fresh memory would cost more than what it is for
    for first in range(aligned, stop, BLOCK):
        count, skipped = min(BLOCK, stop - first), max(start - first, 0)
        part = slice(first + skipped - start, first + count - start)
        eps = cast("Tensor", out)[part] if memory is None else memory[:count]
        _looked_up(_cells(key, first, count), first, key, eps, numbers[:count])
        yield part, eps[skipped:]


class _Generator(threading.local):
    """NumPy's Philox and a state for it: to set the state costs a tenth of a new generator."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.counter, self.key = np.zeros(4, dtype=np.uint64), np.zeros(2, dtype=np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"counter": self.counter, "key": self.key},
            "buffer": np.zeros(4, dtype=np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }


_generator = _Generator()


def _cells(key: int, first: int, count: int) -> np.ndarray:
    """The 16 bits of ``count`` elements, from one on that begins a block of Philox."""
    cells: np.ndarray = _seeded(key, first // PER_PHILOX).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return cells


def _seeded(key: int, block: int) -> np.random.Philox:
    """This thread's generator, about to give the words of a block."""
    own = _generator
    own.key[0], own.key[1] = _halves(key)
    own.counter[0] = block
    own.philox.state = own.state
    return own.philox


def _looked_up(
    cells: np.ndarray,
    elements: np.ndarray | int,
    key: int,
    out: Tensor | None = None,
    numbers: np.ndarray | None = None,
) -> np.ndarray:
    """The values of some cells (n,), of consecutive elements or of the given ones; ``numbers`` is working memory."""
    table, fine = tables(_CPU)
    values: np.ndarray
    if out is None and cells.size <= _SMALL:
        values = table.numpy()[cells]
    else:
        values = (torch.empty(cells.size) if out is None else out).numpy()
        numbers = np.empty(cells.size, dtype=np.int32) if numbers is None else numbers
        np.copyto(numbers, cells)
        torch.index_select(table, 0, torch.from_numpy(numbers), out=torch.from_numpy(values))
    at = (cells + np.uint16(TAIL) < 2 * TAIL).nonzero()[0]  # both ends, for sums of 16 bits wrap around
    if at.size:
        where = at.astype(np.uint64) + np.uint64(elements) if isinstance(elements, int) else elements[at]
        values[at] = _tail(cells[at], where, key, fine.numpy())
    return values


def _tail(cells: np.ndarray, elements: np.ndarray, key: int, fine: np.ndarray) -> np.ndarray:
    x = (elements + np.uint64(1)) * np.uint64(_WEYL[0]) + np.uint64(_halves(key)[0])
    x = (x ^ x >> np.uint64(30)) * np.uint64(_MIX[0])
    x = (x ^ x >> np.uint64(27)) * np.uint64(_MIX[1])
    rest = ((x ^ x >> np.uint64(31)) >> np.uint64(64 - REST_BITS)).astype(np.int32)
    is_low = cells < TAIL
    place = np.where(is_low, cells, ~cells).astype(np.int32) << REST_BITS | rest
    value = fine[((2 * place + 1).astype(np.float32).view(np.int32) >> 23 - FINE_BITS) - (127 << FINE_BITS)]
    signed: np.ndarray = np.where(is_low, value, -value)
    return signed


def normal_rows(key: int, rows: Tensor, width: int) -> Tensor:
    """Return rows of the noise of a table, at the cost of those rows.

    Args:
        key: 128 bits.
        rows: row numbers, any integer dtype.
        width: columns of the table.

    Shape: ``rows`` (n,) -> (n, width), float32.
    """
    if rows.device.type != "cpu":
        return traced_rows(words_of(key, rows.device), rows, width)
    starts = rows.to(torch.int64).numpy() * width
    cells = np.empty((len(starts), width), dtype=np.uint16)
    for row, start in zip(cells, starts.tolist(), strict=True):
        skipped = start % PER_PHILOX
        row[:] = _cells(key, start - skipped, width + skipped)[skipped:]
    elements = (starts[:, None] + np.arange(width)).astype(np.uint64).reshape(-1)
    return torch.from_numpy(_looked_up(cells.reshape(-1), elements, key)).view(cells.shape)


def traced_rows(key: Tensor, rows: Tensor, width: int) -> Tensor:
    """Return :func:`normal_rows` by tensor operations alone, on any device and for a compiler.

    Args:
        key: its words (2,), int64.
        rows: row numbers, any integer dtype.
        width: columns of the table.

    Shape: ``rows`` (n,) -> (n, width), float32.
    """
    first = rows.to(torch.int64)[:, None] * width
    aligned = width % PER_PHILOX == 0
    per_row = width // PER_PHILOX if aligned else (width + 2 * PER_PHILOX - 2) // PER_PHILOX
    counters = first // PER_PHILOX + torch.arange(per_row, device=rows.device)
    shifts = torch.arange(0, 64, 16, device=rows.device)
    words = torch.stack(philox(counters + 1, key), -1)[..., None]
    cells = (words >> shifts & _CELLS - 1).flatten(1)
    columns = torch.arange(width, device=rows.device)
    if not aligned:
        cells = cells.gather(1, first % PER_PHILOX + columns)
    return _values(cells, first + columns, key[0])


def _values(cells: Tensor, elements: Tensor, key: Tensor) -> Tensor:
    """Both tables, without a branch: what a kernel and a compiler like."""
    table, fine = tables(cells.device)
    x = (elements + 1) * _signed(_WEYL[0]) + key
    x = (x ^ _shifted(x, 30)) * _signed(_MIX[0])
    x = (x ^ _shifted(x, 27)) * _signed(_MIX[1])
    rest = _shifted(x ^ _shifted(x, 31), 64 - REST_BITS)
    is_low = cells < TAIL
    outer = torch.where(is_low, cells, _CELLS - 1 - cells)
    place = torch.where(outer < TAIL, outer, 0) << REST_BITS | rest
    number = (2 * place + 1).to(torch.float32).view(torch.int32) >> 23 - FINE_BITS
    value = fine[number - (127 << FINE_BITS)]
    return torch.where(outer < TAIL, torch.where(is_low, value, -value), table[cells])


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x64-10 of the counters (c, 0, 0, 0), in 64-bit integers whose sign is their highest bit.

    Args:
        counter: c, of any shape, int64.
        key: its two words (2,), int64.
    """
    zero = torch.zeros_like(counter)
    x, (k0, k1) = [counter, zero, zero, zero], key.unbind()
    for _ in range(10):
        high0, low0 = _product(x[0], _MULTIPLIERS[0])
        high1, low1 = _product(x[2], _MULTIPLIERS[1])
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = k0 + _signed(_WEYL[0]), k1 + _signed(_WEYL[1])
    return x[0], x[1], x[2], x[3]


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    try:
        from .philox_triton import normal
    except ImportError:
        return None
    return normal


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 64 bits of a product of unsigned 64-bit numbers."""
    high, low = _shifted(x, 32), x & _MASK
    factor_high, factor_low = factor >> 32, factor & _MASK
    middle = high * factor_low + _shifted(low * factor_low, 32)
    other = low * factor_high + (middle & _MASK)
    return high * factor_high + _shifted(middle, 32) + _shifted(other, 32), x * _signed(factor)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return x >> bits & (1 << 64 - bits) - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def words_of(key: int, device: torch.device) -> Tensor:
    """Return the two words of a key (2,), int64."""
    return torch.tensor([_signed(half) for half in _halves(key)], dtype=torch.int64, device=device)


def _halves(key: int) -> tuple[int, int]:
    return key % 2**64, key >> 64


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the means of the normal in 2^16 cells of equal probability, and in those of the lower tail.

    A place q + 1/2 of 2^31 in the tail, q below 2^23, has its finer cell by the first bits of 2 q + 1 as a float32: its
    exponent and 10 bits of its fraction.
    """
    edges = torch.arange(_CELLS + 1, dtype=torch.float64) / _CELLS
    exponents = TAIL.bit_length() + REST_BITS
    starts = 2.0 ** torch.arange(exponents, dtype=torch.float64)[:, None]
    finer = (starts * (1 + torch.arange(2**FINE_BITS, dtype=torch.float64) / 2**FINE_BITS)).flatten()
    finer = torch.cat([finer, torch.tensor([2.0**exponents], dtype=torch.float64)]) / 2.0 ** (17 + REST_BITS)
    return _cell_means(edges).to(device), _cell_means(finer).to(device)


def _cell_means(edges: Tensor) -> Tensor:
    """E[x | p_k <= Phi(x) < p_k+1], the difference of densities over that of probabilities, in float32."""
    densities = torch.exp(-torch.special.ndtri(edges).square() / 2) / math.sqrt(2 * math.pi)
    return (-densities.diff() / edges.diff()).to(torch.float32)
