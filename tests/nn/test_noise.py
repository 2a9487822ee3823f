"""The stateless noise: a function of its key alone, standard normal, independent across whatever the key names."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import types

import pytest
import torch

from bayeformers.nn.noise import noise_key, normal, normal_rows, rows_of
from bayeformers.sampling import philox
from bayeformers.sampling.philox import signs
from tests.reference import dense_noise, key_of, row_noise, signs_of

CPU = torch.device("cpu")
NAMES = ("bert.embeddings.word_embeddings.weight", "lm_head.weight", "a", "")


VERSIONS = (1, 2, 3)


def rows_noise(key: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    return rows_of(key, rows, width, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "index"), [(0, 0), (0, 1), (7, 3), (2**62, 10**6)])
def test_matches_reference(name: str, seed: int, index: int) -> None:
    """Each noise version is what `tests/reference.py` spells out: old checkpoints keep their draws."""
    for version in VERSIONS:
        key = noise_key(seed, index, name, version)
        assert key == key_of(seed, index, name, version)
        assert torch.equal(normal(key, (3, 5), CPU, version), dense_noise(key, (3, 5), version))
    assert torch.equal(normal(key, (37, 100), CPU), dense_noise(key, (37, 100)))  # some values of the tails among them
    assert torch.equal(signs(key, (7, 45), CPU), signs_of(key, (7, 45)))
    rows = [0, 1, 299, 5]
    assert torch.equal(rows_of(key, torch.tensor(rows), 33, 3).double(), row_noise(key, rows, 33))
    rows[2] = 29_999
    # torch's erfinv in float32 and the rounding of its argument: relative errors of some 1e-6 in the body of the normal
    key = noise_key(seed, index, name, 2)
    torch.testing.assert_close(
        rows_of(key, torch.tensor(rows), 33, 2).double(), row_noise(key, rows, 33, 2), rtol=2e-5, atol=1e-6
    )


def test_golden_values() -> None:
    """Numbers of today: a change of the noise must change NOISE_VERSION."""
    key = noise_key(0, 0, "w", 2)
    assert key == 5830214675888881782
    assert normal(key, (3,), CPU, 1).tolist() == pytest.approx([0.34188855, 0.89315248, 1.16844046], rel=1e-6)
    assert normal(key, (3,), CPU, 2).tolist() == pytest.approx(
        [-0.5832399725914001, 0.6216166615486145, -0.982802152633667], rel=1e-6
    )
    assert normal_rows(key, torch.tensor([7]), 3).tolist()[0] == pytest.approx(
        [1.29468811, 0.68015623, 0.99546081], rel=1e-5
    )
    key = noise_key(0, 0, "w")
    assert key == 110072002961221295739655335954614697665
    assert normal(key, (3,), CPU).tolist() == [0.0021227719262242317, 0.7226508855819702, -0.6298956871032715]
    assert signs(key, (9,), CPU).tolist() == [1.0, 1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


def test_philox_is_that_of_the_paper() -> None:
    """Known answers of Random123, `kat_vectors`: philox4x64 of 10 rounds for counter and key of zeros."""
    zeros = torch.zeros(1, dtype=torch.int64)
    found = [int(word) % 2**64 for word in philox.philox(zeros, torch.zeros(2, dtype=torch.int64))]
    assert found == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("start", [0, 5, 16, 2**17 - 3, 2**17 + 32])
@pytest.mark.parametrize("count", [0, 1, 15, 9000, 2**17 + 100])
def test_any_part_is_that_of_the_whole(start: int, count: int) -> None:
    """A range, a row, single elements by tensor operations alone, as other devices take them: the same bits."""
    key = noise_key(3, 1, "whole")
    whole = normal(key, (3 * 2**17,), CPU)
    assert torch.equal(philox.normal_range(key, start, start + count), whole[start : start + count])
    traced = philox.traced_rows(philox.words_of(key, CPU), torch.tensor([start, 0]), 1)
    assert torch.equal(traced, whole[[start, 0], None])
    for width in (16, 33):
        rows = torch.tensor([start // width, 7, 0])
        expected = whole[: len(whole) // width * width].view(-1, width)[rows]
        assert torch.equal(philox.traced_rows(philox.words_of(key, CPU), rows, width), expected)
        assert torch.equal(rows_of(key, rows, width), expected)


@pytest.mark.parametrize("count", [0, 1, 2**20, 2**20 + 17])
def test_a_device_without_a_kernel_of_its_own(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensor operations alone, in parts: here on the CPU, which else would take NumPy's words."""
    key = noise_key(0, 0, "device")
    expected = normal(key, (count,), CPU)
    for name in ("empty", "tensor", "arange"):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, own=own, device=None, **options: own(*args, **options))
    monkeypatch.setattr(philox, "tables", lambda device, own=philox.tables: own(CPU))
    other = types.SimpleNamespace(type="other")
    assert torch.equal(philox.normal(key, (count,), other), expected)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_of_cuda_in_tritons_interpreter() -> None:
    """Bit for bit the CPU's values; the interpreter must be chosen before Triton is imported."""
    code = """
import torch
from bayeformers.sampling import philox, philox_triton
cpu = torch.device("cpu")
constants = philox.tables(cpu), philox.TAIL, philox.REST_BITS, philox.FINE_BITS
for key in (0x123456789ABCDEF0FEDCBA9876543210, 2**128 - 1):
    for count in (0, 15, 3000):
        found = philox_triton.normal(torch.empty(count), philox.words_of(key, cpu), *constants)
        assert torch.equal(found, philox.normal(key, (count,), cpu)), (key, count)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


def test_tables_of_another_machine() -> None:
    """Every draw rests on these two tables: their bits are the same wherever they are made."""
    digests = [hashlib.blake2b(table.numpy().tobytes(), digest_size=8).hexdigest() for table in philox.tables(CPU)]
    assert digests == ["317193ceec9283b9", "3f34c65b3dd094ff"]
    table, fine = (t.double() for t in philox.tables(CPU))
    assert torch.equal(table, -table.flip(0)) and (table.diff() > 0).all() and (fine.diff() > 0).all()
    # cells of one probability: what is lost of the variance is that within the cells, of which the tails have most
    assert abs(float(table.square().mean()) - 1) < 2e-6


def test_tails() -> None:
    """n = 3 * 10^7: the numbers beyond 2.7 to 5.4 sigma are Poisson with means n p; 4.5 standard errors, and 1."""
    n, key = 30_000_000, noise_key(2, 0, "tails")
    values = torch.cat([part.clone()[part.abs() > 2.7] for _, part in philox.blocks(key, 0, n)]).double()
    for bound in (2.7, 2.9, 3.0, 3.1, 3.5, 4.0, 4.5, 5.0, 5.4):
        for side in (1, -1):
            expected = n * math.erfc(bound / math.sqrt(2)) / 2
            found = int((side * values > bound).sum())
            assert abs(found - expected) < 4.5 * math.sqrt(expected) + 1, (bound, side, found, expected)
    inside = torch.distributions.Normal(0.0, 1.0).cdf(-values.abs()) / float(
        torch.special.ndtr(torch.tensor(-2.7, dtype=torch.float64))
    )
    steps = torch.arange(1, len(inside) + 1, dtype=torch.float64) / len(inside)
    assert float((inside.sort().values - steps).abs().max()) < 1.95 / math.sqrt(len(inside))  # P = 0.001, as below


def test_bits_of_cells_and_of_tails_are_independent() -> None:
    """Tail values of one cell, 16 bits more: uniform and unlike their neighbours'; chi-squared of 64 cells, 5 sigma."""
    key = noise_key(0, 0, "cells")
    cells = torch.from_numpy(philox._cells(key, 0, 2**24).astype("int64"))
    counts = torch.bincount(cells >> 4, minlength=4096).double()
    for found in (counts, torch.bincount((cells & 255) * 16 + (cells.roll(1) & 15), minlength=4096).double()):
        expected = len(cells) / 4096
        assert abs(float(((found - expected) ** 2 / expected).sum()) - 4095) < 5 * math.sqrt(2 * 4095)


@pytest.mark.parametrize("width", [1, 3, 16, 33, 128])
def test_rows_do_not_depend_on_each_other(width: int) -> None:
    """A row has the same bits alone, in any company, order, dtype of ids, and number of copies."""
    key = noise_key(5, 2, "table")
    table = rows_noise(key, torch.arange(200), width)
    assert table.dtype == torch.float32
    for count in (1, 2, 3, 5, 17, 64, 199):
        rows = torch.randperm(200)[:count]
        assert torch.equal(rows_noise(key, rows, width), table[rows])
        assert torch.equal(rows_noise(key, rows.int(), width), table[rows])
    assert torch.equal(rows_noise(key, torch.tensor([4, 4, 4]), width), table[[4, 4, 4]])
    assert torch.equal(table, normal(key, (200, width), CPU))  # a table's rows are those of any tensor


def test_stateless() -> None:
    """The default generator is neither read nor moved."""
    state = torch.get_rng_state()
    first = normal(3, (4,), CPU), rows_noise(3, torch.arange(4), 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for a, b in zip(first, (normal(3, (4,), CPU), rows_noise(3, torch.arange(4), 2)), strict=True):
        assert torch.equal(a, b)


def test_all_bits_of_the_key_count() -> None:
    """These two tensors' keys have their low 32 bits in common, all that a CPU's generator keeps of a seed."""
    keys = [noise_key(0, 0, f"layers.{number}.weight", 2) for number in (9521, 89899)]
    assert keys[0] % 2**32 == keys[1] % 2**32
    for version in (2, 3):
        first, second = (normal(key, (200, 200), CPU, version) for key in keys)
        assert abs(float((first * second).mean())) < 4 / 200
    # a key that differs in one bit, any: nothing in common, to 5 standard errors 1 / sqrt n of 128 correlations
    base = normal(keys[0], (100, 100), CPU)
    for bit in range(128):
        other = normal(keys[0] ^ 1 << bit, (100, 100), CPU)
        assert abs(float((base * other).mean())) < 5 / 100, bit
    assert torch.isfinite(normal(0, (100,), CPU)).all() and torch.isfinite(normal(2**128 - 1, (100,), CPU)).all()


def sources() -> dict[str, torch.Tensor]:
    key = noise_key(1, 2, "moments")
    return {"dense": normal(key, (1000, 1000), CPU), "rows": rows_noise(key, torch.arange(1000), 1000)}


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_moments(kind: str) -> None:
    """n = 10^6: standard errors of the first four moments are 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n; 4 of them."""
    values = sources()[kind].double()
    error = 4 / math.sqrt(values.numel())
    for power, expected, deviation in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float(values.pow(power).mean()) - expected) < error * math.sqrt(deviation)
    assert torch.isfinite(values).all() and values.abs().max() < 6
    # Kolmogorov-Smirnov: P(sup > 1.95 / sqrt n) = 0.001
    grid = torch.distributions.Normal(0.0, 1.0).cdf(values.flatten().sort().values)
    steps = torch.arange(1, values.numel() + 1, dtype=torch.float64) / values.numel()
    assert float((grid - steps).abs().max()) < 1.95 / math.sqrt(values.numel())


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_independence(kind: str) -> None:
    """Correlations, of values and of squares, at 4 standard errors 1 / sqrt n: neighbours, names, draws, seeds."""

    def make(seed: int, index: int, name: str) -> torch.Tensor:
        key = noise_key(seed, index, name)
        return normal(key, (500, 500), CPU) if kind == "dense" else rows_noise(key, torch.arange(500), 500)

    base = make(0, 0, "a")
    pairs = [(base, make(0, 0, "b")), (base, make(0, 1, "a")), (base, make(1, 0, "a")), (base, make(0, 0, "A"))]
    for step in (1, 2, 3, 7, 16, 64, 128, 256):
        pairs += [
            (base[step:], base[:-step]),
            (base[:, step:], base[:, :-step]),
            (base[step:, step:], base[:-step, :-step]),
        ]
    pairs += [(base[::2], base[1::2]), (base, base.T.clone().fill_diagonal_(0))]
    tests = 0
    for a, b in pairs:
        for power in (1, 2):
            x, y = (v.double().pow(power).flatten() for v in (a, b))
            x, y = (v - v.mean() for v in (x, y))
            correlation = float((x * y).mean() / (x.std() * y.std()))
            if a.shape == b.shape and torch.equal(b, base.T.clone().fill_diagonal_(0)):
                bound = 4 * math.sqrt(2) / math.sqrt(x.numel())  # each pair is there twice
            else:
                bound = 4 / math.sqrt(x.numel())
            tests += 1
            assert abs(correlation) < bound, (a.shape, power)
    assert tests > 50
    # rows and columns: mean of 500 values has deviation 1/sqrt 500; the largest of 500 means stays below 4.5 of them
    for dim in (0, 1):
        assert float(base.mean(dim).abs().max()) < 4.5 / math.sqrt(500)
    singular = torch.linalg.svdvals(base.double() / math.sqrt(500))
    assert float(singular[0]) < 2.1 and float(singular[-1]) < 0.05  # Marchenko-Pastur: the edge is 2


def test_rows_are_distinct() -> None:
    """No two of 50,000 rows are alike, nor alike to a neighbour shifted by a column."""
    table = rows_noise(noise_key(0, 0, "t"), torch.arange(50_000), 8)
    assert len(torch.unique(table, dim=0)) == 50_000
    assert not (table[:-1, 1:] == table[1:, :-1]).all(1).any()
