"""EaU and EaC against loops over items, in every corner, and in half precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayeformers.losses import eac_loss, eau_loss

EPS = 0.01


def by_loop(error: Tensor, certainty: list[float], is_certain: list[bool], error_threshold: float) -> float:
    n_lc = n_lu = n_hc = n_hu = 0.0
    for e, k, certain in zip(error.flatten().tolist(), certainty, is_certain, strict=True):
        if e <= error_threshold and certain:
            n_lc += (1 - math.tanh(e)) * k
        elif e <= error_threshold:
            n_lu += (1 - math.tanh(e)) * (1 - k)
        elif certain:
            n_hc += math.tanh(e) * k
        else:
            n_hu += math.tanh(e) * (1 - k)
    return math.log(1 + (n_lu + n_hc + EPS) / (n_lc + n_hu + EPS))


def random_case(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.rand(*shape, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize("shape", [(1,), (2,), (50,), (8, 3)])
@pytest.mark.parametrize("thresholds", [(1.0, 1.0), (0.3, 1.4), (0.0, 0.5), (5.0, 5.0)])
def test_both_equal_loops(shape: tuple[int, ...], thresholds: tuple[float, float]) -> None:
    error, spread = random_case(sum(shape), *shape)
    tau, limit = thresholds
    spreads = spread.flatten().tolist()
    expected = by_loop(error, [1 - math.tanh(u) for u in spreads], [u <= limit for u in spreads], tau)
    assert float(eau_loss(error, spread, tau, limit)) == pytest.approx(expected, rel=1e-12)
    confidence = spread / 2
    chances = confidence.flatten().tolist()
    expected = by_loop(error, chances, [c >= limit / 5 for c in chances], tau)
    assert float(eac_loss(error, confidence, tau, limit / 5)) == pytest.approx(expected, rel=1e-12)


def test_gradcheck() -> None:
    error, spread = (value.requires_grad_() for value in random_case(3, 12))
    assert torch.autograd.gradcheck(lambda e, u: eau_loss(e, u, 0.9, 1.1), (error, spread))
    assert torch.autograd.gradcheck(lambda e, c: eac_loss(e, c / 2, 0.9, 0.4), (error, spread))


CORNERS = {
    "all low": torch.zeros(3),
    "all high": torch.full((3,), 1e4),
    "one item": torch.tensor([0.5]),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("certainty", [0.0, 1.0])
def test_value_and_gradient_are_finite(name: str, certainty: float, dtype: torch.dtype) -> None:
    for loss in (eau_loss, eac_loss):
        error = CORNERS[name].clone().to(dtype).requires_grad_()
        other = torch.full_like(error, certainty).detach().requires_grad_()
        value = loss(error, other, 1.0, 0.5)
        value.backward()
        assert value.dim() == 0 and value.isfinite() and value >= 0
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error.grad.isfinite().all() and other.grad.isfinite().all()


def test_aligned_is_better_than_misaligned() -> None:
    error = torch.tensor([0.1, 0.1, 3.0])
    assert eau_loss(error, error, 1.0, 1.0) < eau_loss(error, error.flip(0), 1.0, 1.0)
    chance = torch.tensor([0.9, 0.9, 0.1])
    assert eac_loss(error, chance, 1.0, 0.5) < eac_loss(error, chance.flip(0), 1.0, 0.5)


GOOD = torch.rand(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": [0.1]}, "`error` must be a floating-point tensor"),
        ({"error": torch.ones(4, dtype=torch.long)}, "`error` must be a floating-point tensor, got torch.int64"),
        ({"error": -GOOD}, "`error` must be finite and >= 0"),
        ({"uncertainty": GOOD * torch.inf}, "`uncertainty` must be finite and >= 0"),
        ({"uncertainty": GOOD[:2]}, r"`uncertainty` must have the shape \(4,\) of `error`, got \(2,\)"),
        ({"error_threshold": math.inf}, "`error_threshold` must be finite"),
        ({"uncertainty_threshold": None}, "`uncertainty_threshold` must be a number"),
        ({"eps": -1.0}, "`eps` must be a finite number > 0"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments = {"error": GOOD, "uncertainty": GOOD, "error_threshold": 0.5, "uncertainty_threshold": 0.5, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        eau_loss(**arguments)


def test_confidence_is_a_probability() -> None:
    with pytest.raises(ValueError, match=r"`confidence` must lie in \[0, 1\], got 1.5"):
        eac_loss(torch.ones(2), torch.tensor([0.5, 1.5]), 1.0, 0.5)
