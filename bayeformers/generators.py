"""Random generators that are seeded with all 64 bits of a key, for noise that is a pure function of its key.

`torch.Generator.manual_seed` on a CPU keeps the low 32 bits of a seed: among the tensors and draws of one large model
some two would then have the same noise.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

NOISE_VERSION = 2
"""Of every stateless draw: raise it with any change that changes the draws of saved posteriors.

1: on a CPU the low 32 bits of a key seed the generator. 2: all 64 bits do.
"""

_WORDS, _OFFSET, _BYTES = 624, 3, 5056  # of the Mersenne twister's state, in torch's 64-bit words


def check_noise_version(version: object, name: str = "noise_version") -> int:
    """``version`` if its draws can be repeated.

    Raises:
        ValueError: it is of a newer bayeformers, or no version at all.
    """
    if type(version) is not int or not 1 <= version <= NOISE_VERSION:
        raise ValueError(f"`{name}` is {version!r}, this bayeformers reads up to {NOISE_VERSION}: upgrade bayeformers.")
    return version


def keyed_generator(key: int, device: torch.device, version: int = NOISE_VERSION) -> torch.Generator:
    """A generator whose state is a function of ``key`` alone.

    Args:
        key: a whole number of 64 bits, >= 0.
        device: of the generator.
        version: see `NOISE_VERSION`.

    Raises:
        RuntimeError: this build of torch keeps the state of its generator otherwise than all known ones.
    """
    generator = torch.Generator(device=device)
    if device.type != "cpu" or version == 1:
        return generator.manual_seed(key % 2**63)
    template, factors, terms = _twister()
    state = template.copy()
    words = state[_OFFSET : _OFFSET + _WORDS]
    np.multiply(factors, np.uint64(_mixed(key)), out=words)
    words += terms
    words >>= np.uint64(32)
    generator.set_state(torch.from_numpy(state.view(np.uint8)))
    return generator


def _mixed(key: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014): a product's upper half shows little of its upper bits alone."""
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return key ^ key >> 31


@functools.cache
def _twister() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A freshly seeded state, and fixed random a and b: word i of a key's state is the upper half of a_i k + b_i.

    Multiply-shift hashing (Dietzfelbinger et al. 1996): two keys share a word with probability about 2^-32, and never
    all of them.
    """
    state = torch.Generator().manual_seed(1).get_state().numpy()
    template = state.view(np.uint64).copy() if state.nbytes == _BYTES else None
    seeded = [1]
    for i in range(1, _WORDS):  # Matsumoto & Nishimura 1998
        seeded.append((1812433253 * (seeded[-1] ^ seeded[-1] >> 30) + i) % 2**32)
    if template is None or template[_OFFSET : _OFFSET + _WORDS].tolist() != seeded:
        raise RuntimeError(f"torch {torch.__version__} keeps its generator's state in a form unknown to bayeformers.")
    numbers = np.random.RandomState(20261130).bytes(16 * _WORDS)  # a frozen stream: the same in every NumPy
    factors, terms = np.frombuffer(numbers, dtype="<u8").astype(np.uint64).reshape(2, _WORDS)
    return template, factors, terms
