"""The stateless noise: a function of its key alone, standard normal, independent across whatever the key names."""

from __future__ import annotations

import math

import pytest
import torch

from bayeformers.nn.noise import noise_key, normal, normal_rows
from tests.reference import dense_noise, key_of, row_noise

CPU = torch.device("cpu")
NAMES = ("bert.embeddings.word_embeddings.weight", "lm_head.weight", "a", "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("seed", "index"), [(0, 0), (0, 1), (7, 3), (2**62, 10**6)])
def test_matches_reference(name: str, seed: int, index: int) -> None:
    """Each noise version is what `tests/reference.py` spells out: old checkpoints keep their draws."""
    key = noise_key(seed, index, name)
    assert key == key_of(seed, index, name)
    for version in (1, 2):
        assert torch.equal(normal(key, (3, 5), CPU, version), dense_noise(key, (3, 5), version))
    rows = [0, 1, 29_999, 5]
    # torch's erfinv in float32 and the rounding of its argument: relative errors of some 1e-6 in the body of the normal
    torch.testing.assert_close(
        normal_rows(key, torch.tensor(rows), 33).double(), row_noise(key, rows, 33), rtol=2e-5, atol=1e-6
    )


def test_golden_values() -> None:
    """Numbers of today: a change of the noise must change NOISE_VERSION."""
    key = noise_key(0, 0, "w")
    assert key == 5830214675888881782
    assert normal(key, (3,), CPU, 1).tolist() == pytest.approx([0.34188855, 0.89315248, 1.16844046], rel=1e-6)
    assert normal(key, (3,), CPU).tolist() == pytest.approx(
        [-0.5832399725914001, 0.6216166615486145, -0.982802152633667], rel=1e-6
    )
    assert normal_rows(key, torch.tensor([7]), 3).tolist()[0] == pytest.approx(
        [1.29468811, 0.68015623, 0.99546081], rel=1e-5
    )


@pytest.mark.parametrize("width", [1, 3, 16, 33, 128])
def test_rows_do_not_depend_on_each_other(width: int) -> None:
    """A row has the same bits alone, in any company, order, dtype of ids, and number of copies."""
    key = noise_key(5, 2, "table")
    table = normal_rows(key, torch.arange(200), width)
    assert table.dtype == torch.float32
    for count in (1, 2, 3, 5, 17, 64, 199):
        rows = torch.randperm(200)[:count]
        assert torch.equal(normal_rows(key, rows, width), table[rows])
        assert torch.equal(normal_rows(key, rows.int(), width), table[rows])
    assert torch.equal(normal_rows(key, torch.tensor([4, 4, 4]), width), table[[4, 4, 4]])
    assert torch.equal(normal_rows(key, torch.arange(200), 200)[:, :width], table)


def test_stateless() -> None:
    """The default generator is neither read nor moved."""
    state = torch.get_rng_state()
    first = normal(3, (4,), CPU), normal_rows(3, torch.arange(4), 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for a, b in zip(first, (normal(3, (4,), CPU), normal_rows(3, torch.arange(4), 2)), strict=True):
        assert torch.equal(a, b)


def test_all_bits_of_the_key_count() -> None:
    """These two tensors' keys have their low 32 bits in common, all that a CPU's generator keeps of a seed."""
    keys = [noise_key(0, 0, f"layers.{number}.weight") for number in (9521, 89899)]
    assert keys[0] % 2**32 == keys[1] % 2**32
    first, second = (normal(key, (200, 200), CPU) for key in keys)
    assert abs(float((first * second).mean())) < 4 / 200
    # a key that differs in one bit, any: nothing in common, to 5 standard errors 1 / sqrt n of 64 correlations
    base = normal(keys[0], (100, 100), CPU)
    for bit in range(64):
        other = normal(keys[0] ^ 1 << bit, (100, 100), CPU)
        assert abs(float((base * other).mean())) < 5 / 100, bit
    assert torch.isfinite(normal(0, (100,), CPU)).all() and torch.isfinite(normal(2**64 - 1, (100,), CPU)).all()


def sources() -> dict[str, torch.Tensor]:
    key = noise_key(1, 2, "moments")
    return {"dense": normal(key, (1000, 1000), CPU), "rows": normal_rows(key, torch.arange(1000), 1000)}


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
        return normal(key, (500, 500), CPU) if kind == "dense" else normal_rows(key, torch.arange(500), 500)

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
    table = normal_rows(noise_key(0, 0, "t"), torch.arange(50_000), 8)
    assert len(torch.unique(table, dim=0)) == 50_000
    assert not (table[:-1, 1:] == table[1:, :-1]).all(1).any()
