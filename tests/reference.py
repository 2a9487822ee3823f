"""Brute-force references, independent of the package: NumPy and float64, elements and formulas written out.

Nothing here imports `bayeformers`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy.special import erfinv, ndtri
from torch import Tensor, nn

FLOOR = 1e-8  # of every sigma


# ------------------------------------------------------------------------------------------------------------ scales


def softplus(rho: Tensor) -> Tensor:
    """log(1 + exp(rho)) in float64 as max(rho, 0) + log1p(exp(-|rho|))."""
    rho = rho.detach().double()
    return rho.clamp_min(0) + torch.log1p(torch.exp(-rho.abs()))


def sigma(rho: Tensor) -> Tensor:
    """max(softplus(rho), 1e-8) in float64."""
    return softplus(rho).clamp_min(FLOOR)


def sigma_slope(rho: Tensor) -> Tensor:
    """d sigma / d rho in float64: the logistic function, and its value at the floor below it."""
    rho = rho.detach().double()
    return torch.where(softplus(rho) > FLOOR, 1 / (1 + torch.exp(-rho)), -math.expm1(-FLOOR))


def moped_sigma(weight: Tensor, delta: float) -> Tensor:
    """delta * max(|w|, mean|w| / 10), or delta * 0.02 where the whole tensor is zero; one element at a time."""
    values = weight.detach().double().flatten().tolist()
    mean = math.fsum(abs(v) for v in values) / len(values)
    scales = [delta * (max(abs(v), 0.1 * mean) if mean > 0 else 0.02) for v in values]
    return torch.tensor(scales, dtype=torch.float64).reshape(weight.shape)


# ------------------------------------------------------------------------------------------------------------- noise


def key_of(seed: int, index: int, name: str, version: int = 3) -> int:
    """16 bytes of blake2b of "seed/index/name", before version 3 its 8 bytes, little endian."""
    size = 16 if version >= 3 else 8
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}/{name}".encode(), digest_size=size).digest(), "little")


def philox(key: int, block: int) -> list[int]:
    """Four words of Philox4x64-10 of the counter (block, 0, 0, 0), as Salmon et al. 2011 write it."""
    (k0, k1), (x0, x1, x2, x3), most = (key % 2**64, key >> 64), (block, 0, 0, 0), 2**64 - 1
    for _ in range(10):
        a, b = x0 * 0xD2E7470EE14C6C93, x2 * 0xCA5A826395121157
        x0, x1, x2, x3 = b >> 64 ^ x1 ^ k0, b & most, a >> 64 ^ x3 ^ k1, a & most
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & most, k1 + 0xBB67AE8584CAA73B & most
    return [x0, x1, x2, x3]


def words(key: int) -> Iterator[int]:
    """The words of all blocks, from that of counter 1 on."""
    return itertools.chain.from_iterable(philox(key, block) for block in itertools.count(1))


@functools.cache
def cell_mean(low: float, high: float) -> float:
    """E[x | low <= Phi(x) < high], rounded to float32, for probabilities of at most 1/2 (above it, by symmetry)."""
    if low >= 0.5:
        return -cell_mean(1 - high, 1 - low)
    density = [math.exp(-(float(ndtri(p)) ** 2) / 2) / math.sqrt(2 * math.pi) if p else 0.0 for p in (low, high)]
    return float(np.float32((density[0] - density[1]) / (high - low)))


def element(key: int, number: int, cell: int) -> float:
    """The value of 16 bits: of the cell's mean, or in the outermost 256 cells of that of a finer one."""
    if 256 <= cell < 2**16 - 256:
        return cell_mean(cell / 2**16, (cell + 1) / 2**16)
    x = ((number + 1) * 0x9E3779B97F4A7C15 + key) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    is_low = cell < 256
    half_places = 2 * ((cell if is_low else 2**16 - 1 - cell) * 2**15 + ((x ^ x >> 31) >> 49)) + 1
    step = 2.0 ** (half_places.bit_length() - 11)  # 2^10 cells for each power of two
    low = half_places // step * step
    return cell_mean(low / 2**32, (low + step) / 2**32) * (1 if is_low else -1)


def noise_values(key: int) -> Iterator[float]:
    """N(0, 1), element by element: 16 bits each, from the words' lowest bits on."""
    cells = (word >> shift & 2**16 - 1 for word in words(key) for shift in (0, 16, 32, 48))
    return (element(key, number, cell) for number, cell in enumerate(cells))


def signs_of(key: int, shape: tuple[int, ...]) -> Tensor:
    """Fair signs, one bit each, from the words' lowest bits on."""
    bits = (word >> shift & 1 for word in words(key) for shift in range(64))
    return torch.tensor(list(itertools.islice(bits, math.prod(shape)))).reshape(shape) * 2.0 - 1.0


@functools.cache
def twister_constants() -> list[tuple[int, int]]:
    """624 pairs of 64-bit numbers from NumPy's frozen stream: all factors first, then all terms."""
    numbers = struct.unpack("<1248Q", np.random.RandomState(20261130).bytes(8 * 1248))
    return list(zip(numbers[:624], numbers[624:], strict=True))


def keyed_generator(key: int, version: int = 2) -> torch.Generator:
    """Seeded with the key; or, word by word, with its hashes."""
    generator = torch.Generator().manual_seed(key & (2**63 - 1) if version == 1 else 0)
    if version > 1:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):  # splitmix64
            key = (key ^ key >> shift) * factor % 2**64
        words = [(a * key + b) % 2**64 >> 32 for a, b in twister_constants()]
        # seed, left, seeded, next, the words, then nothing kept of a normal or a float
        state = struct.pack("<QiiQ624QdddiifBxxx", 0, 1, 1, 0, *words, 0.0, 0.0, 0.0, 0, 0, 0.0, 0)
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def dense_noise(key: int, shape: tuple[int, ...], version: int = 3) -> Tensor:
    """N(0, 1) of a tensor in float32; before version 3 from a generator used once."""
    if version >= 3:
        return torch.tensor(list(itertools.islice(noise_values(key), math.prod(shape)))).reshape(shape)
    return torch.randn(shape, generator=keyed_generator(key, version))


def mix(x: int) -> int:
    """Wellons' lowbias32 on Python integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def row_noise(key: int, rows: Iterable[int], width: int, version: int = 3) -> Tensor:
    """N(0, 1) of rows of a table.

    Before version 3 by two rounds of `mix` over (key, row, column), then the inverse normal CDF.
    """
    if version >= 3:
        return dense_noise(key, (max(rows := list(rows)) + 1, width))[rows].double()
    low, high = key & 0xFFFFFFFF, key >> 32
    table = []
    for row in rows:
        first, second = mix(row ^ low), mix(mix(row ^ high) ^ low)
        for column in range(width):
            bits = mix(mix(first + column * 0x9E3779B9 & 0xFFFFFFFF) ^ second)
            signed = bits - 2**32 if bits >= 2**31 else bits
            table.append(((signed >> 8) + 0.5) / 2**23)
    return torch.from_numpy(math.sqrt(2) * erfinv(np.array(table))).reshape(-1, width)


def noise_of(
    model: nn.Module, layers: Mapping[str, str], index: int, seed: int = 0, bare: Container[str] = ()
) -> dict[str, Tensor]:
    """Noise of every distinct tensor of the layers named in ``layers`` (name -> kind) of a plain model, by first name.

    ``bare`` holds names of further tensors. The padding row of a tensor that an Embedding owns has none.
    """
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            if name in layers or f"{name}.{parameter}".lstrip(".") in bare:
                owners.setdefault(id(value), []).append((name, parameter))
    noise = {}
    for owned in owners.values():
        names = [".".join(filter(None, pair)) for pair in owned]
        value = model.get_parameter(names[0])
        key = key_of(seed, index, names[0])
        tables = [model.get_submodule(name) for name, _ in owned if layers.get(name) == "Embedding"]
        eps = row_noise(key, range(len(value)), value.shape[1]) if tables else dense_noise(key, tuple(value.shape))
        for table in tables:
            if table.padding_idx is not None:
                eps[table.padding_idx] = 0
        noise[names[0]] = eps
    return noise


# ------------------------------------------------------------------------------------------------------------ models


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating tensor in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    return [t for item in output for t in tensors_of(item)] if isinstance(output, Iterable) else []


def probe(output: Any) -> Tensor:
    """A scalar that depends on every element of a model's output."""
    parts = [torch.tanh(t).mul(torch.linspace(-1, 2, t.numel()).reshape(t.shape)).sum() for t in tensors_of(output)]
    return torch.stack(parts).sum()


def run_with(model: nn.Module, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Any:
    """A plain model's output with some of its Parameters replaced; tied ones follow."""
    return torch.func.functional_call(model, dict(weights), kwargs=dict(inputs), tie_weights=True)


def gradients(loss_of: Callable[[dict[str, Tensor]], Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """dL/dw with the weights as leaves; zero where the loss does not depend on one."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    found = torch.autograd.grad(loss_of(leaves), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(leaves.items(), found, strict=True)}


# -------------------------------------------------------------------------------------------------------- divergences


def normal_log_density(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    """log N(x; loc, scale^2)."""
    loc, scale = (torch.as_tensor(value, dtype=torch.float64) for value in (loc, scale))
    return torch.distributions.Normal(loc, scale).log_prob(x)


def kl_by_quadrature(loc: float, scale: float, log_prior: Callable[[Tensor], Tensor], nodes: int = 200_001) -> float:
    """KL(N(loc, scale^2) || p) of one weight by the trapezoid rule over +-14 scales.

    For smooth integrands that vanish at the ends the rule converges faster than any power of the step.
    """
    x = torch.linspace(loc - 14 * scale, loc + 14 * scale, nodes, dtype=torch.float64)
    log_q = normal_log_density(x, loc, scale)
    return float(torch.trapezoid(log_q.exp() * (log_q - log_prior(x)), x))
