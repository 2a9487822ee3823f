"""Random generators that are seeded with all 64 bits of a key, for noise that is a pure function of its key.

`torch.Generator.manual_seed` on a CPU keeps the low 32 bits of a seed: among the tensors and draws of one large model
some two would then have the same noise.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import torch

from . import philox

NOISE_VERSION = 3
"""Of every stateless draw: raise it with any change that changes the draws of saved posteriors.

1: on a CPU the low 32 bits of a key seed torch's generator. 2: all 64 bits do. 3: there is no generator, but a counter,
see `bayeformers.sampling.philox`.
"""

_WORDS, _OFFSET, _BYTES = 624, 3, 5056  # of the Mersenne twister's state, in torch's 64-bit words
_HALF = np.uint64(32)


def check_noise_version(version: object, name: str = "noise_version") -> int:
    """``version`` if its draws can be repeated; one of a newer bayeformers, or none at all, is a ValueError."""
    if type(version) is not int or not 1 <= version <= NOISE_VERSION:
        raise ValueError(f"`{name}` is {version!r}, this bayeformers reads up to {NOISE_VERSION}: upgrade bayeformers.")
    return version


def keyed_generator(key: int, device: torch.device, version: int = NOISE_VERSION) -> torch.Generator:
    """A generator whose state is a function of ``key`` alone: for noise before version 3, and where none is saved.

    Args:
        key: a whole number of 64 bits, >= 0.
        device: of the generator.
        version: see `NOISE_VERSION`.

    Returns:
        The generator; RuntimeError where this build of torch keeps its state otherwise than all known ones.
    """
    generator = torch.Generator(device=device)
    if device.type != "cpu" or version == 1:
        return generator.manual_seed(key % 2**63)
    (factors, terms), scratch = _constants(), _scratch()
    np.multiply(factors, np.uint64(_mixed(key)), out=scratch.words)
    np.add(scratch.words, terms, out=scratch.words)
    np.right_shift(scratch.words, _HALF, out=scratch.words)
    return generator.set_state(scratch.state)


def normal_of(
    key: str,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    version: int = NOISE_VERSION,
) -> torch.Tensor:
    """Return standard normal values that are a function of a text alone.

    Args:
        key: the text, whose hash is the key of the noise.
        shape: of the result.
        device: of the result.
        dtype: of the values.
        version: see `NOISE_VERSION`.
    """
    if version >= 3:
        return philox.normal(philox.key_of(key), tuple(shape), torch.device(device)).to(dtype)
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    generator = keyed_generator(number, torch.device(device), version)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)


class _Scratch(threading.local):
    """A generator's state of this thread, which `set_state` copies: its words, and all of it on the same memory."""

    def __init__(self) -> None:
        state = _seeded_state().copy()
        self.words, self.state = state[_OFFSET : _OFFSET + _WORDS], torch.from_numpy(state.view(np.uint8))


def _mixed(key: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014): a product's upper half shows little of its upper bits alone."""
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return key ^ key >> 31


_scratch = functools.cache(_Scratch)


@functools.cache
def _seeded_state() -> np.ndarray:
    """A freshly seeded state, in 64-bit words; RuntimeError where its form is none of a known version of torch."""
    state = torch.Generator().manual_seed(1).get_state().numpy()
    words = state.view(np.uint64) if state.nbytes == _BYTES else state
    seeded = [1]
    for i in range(1, _WORDS):  # Matsumoto & Nishimura 1998
        seeded.append((1812433253 * (seeded[-1] ^ seeded[-1] >> 30) + i) % 2**32)
    if words[_OFFSET : _OFFSET + _WORDS].tolist() != seeded:
        raise RuntimeError(f"torch {torch.__version__} keeps its generator's state in a form unknown to bayeformers.")
    return words


@functools.cache
def _constants() -> tuple[np.ndarray, np.ndarray]:
    """Fixed random a and b: word i of a key's state is the upper half of a_i k + b_i."""
    # multiply-shift hashing (Dietzfelbinger et al. 1996): two keys share a word with probability about 2^-32, and
    # never all of them
    numbers = np.random.RandomState(20261130).bytes(16 * _WORDS)  # a frozen stream: the same in every NumPy
    factors, terms = np.frombuffer(numbers, dtype="<u8").astype(np.uint64).reshape(2, _WORDS)
    return factors, terms
