"""The scale's parametrisation: floor, inverse, and finiteness over the whole range of rho."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayeformers.distributions import MIN_SCALE, DiagonalNormal, kl_divergence, rho_from_scale, scale_from_rho
from bayeformers.distributions.block_kl import normal_kl
from bayeformers.nn.variational import sample, variance
from tests.reference import sigma, sigma_slope

RHO = torch.linspace(-200, 200, 4001)


@pytest.mark.protects("softplus_is_stable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_stable(dtype: torch.dtype) -> None:
    """softplus_is_stable: sigma, log sigma and both gradients finite for rho in [-200, 200], and right."""
    for function, slope in ((torch.Tensor.clone, 1.0), (torch.Tensor.log, None)):
        rho = RHO.to(dtype).clone().requires_grad_()
        value = function(scale_from_rho(rho))
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(rho.grad).all()  # type: ignore[arg-type]
        expected = sigma_slope(RHO) if slope else sigma_slope(RHO) / sigma(RHO)
        torch.testing.assert_close(rho.grad.double(), expected, rtol=1e-4, atol=1e-9)  # type: ignore[union-attr]
    torch.testing.assert_close(scale_from_rho(RHO.to(dtype)).double(), sigma(RHO), rtol=1e-5, atol=0)


def test_floor_is_exact() -> None:
    assert float(scale_from_rho(torch.tensor(-200.0, dtype=torch.float64))) == MIN_SCALE == 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rho_from_scale_inverts(dtype: torch.dtype) -> None:
    """Log-spaced scales from the floor to 100. Below 1, d log sigma / d rho <= 1 and |rho| <= 18.5: 18.5 eps and some
    roundings; above 20 torch's softplus returns rho itself, which leaves out e^-20 / 20 = 1.03e-10.
    """
    scale = torch.logspace(-7.9, 2, 500, dtype=dtype)
    rho = rho_from_scale(scale)
    assert torch.isfinite(rho).all()
    torch.testing.assert_close(scale_from_rho(rho), scale, rtol=40 * torch.finfo(dtype).eps + 1.1e-10, atol=0)
    assert float(scale_from_rho(rho_from_scale(torch.zeros((), dtype=dtype)))) == pytest.approx(1e-8, rel=1e-5)


def test_log_prob_matches_torch() -> None:
    value = torch.linspace(-3, 3, 7, dtype=torch.float64)
    loc, scale = torch.tensor(0.3).double(), torch.tensor(0.2).double()
    expected = torch.distributions.Normal(loc, scale).log_prob(value)
    torch.testing.assert_close(DiagonalNormal(loc, scale).log_prob(value), expected)


def test_rsample_is_loc_plus_scale_times_noise() -> None:
    loc, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, math.e))
    value = DiagonalNormal(loc, scale).rsample(torch.tensor(-2.0, dtype=torch.float64))
    value.backward()
    assert float(value.detach()) == 0.5 - 2 * math.e
    assert (float(loc.grad), float(scale.grad)) == (1.0, -2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [-18.5, -30.0, -200.0])
def test_a_scale_leaves_its_floor(start: float) -> None:
    """Under the floor d log sigma / d rho = 1, as at it: a KL that wants a larger scale can have it."""
    rho = torch.tensor([start], requires_grad=True)
    scale_from_rho(rho).log().sum().backward()
    assert float(rho.grad) == pytest.approx(1.0, rel=1e-5)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([rho], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        q = DiagonalNormal(torch.zeros(1), scale_from_rho(rho))
        kl_divergence(q, DiagonalNormal(torch.zeros(1), torch.ones(1))).backward()
        optimizer.step()
    assert float(scale_from_rho(rho.detach())) > 0.1


def test_every_way_to_the_scale_has_one_slope() -> None:
    """The draw, the variance, the KL in one pass and the plain KL: gradients in rho on both sides of the floor."""
    points = torch.tensor([-200.0, -40.0, -18.5, -18.42, -18.4, -10.0, 0.0, 30.0], dtype=torch.float64)
    slope, scale = sigma_slope(points), sigma(points)

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        rho = points.clone().requires_grad_()
        (found,) = torch.autograd.grad(function(rho).sum(), rho)
        return found

    def near(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)

    loc, one = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    near(gradient(lambda rho: sample(loc, rho, 3 * one)), 3 * slope)
    near(gradient(variance), 2 * scale * slope)
    kl = (scale - 1 / scale) * slope
    near(gradient(lambda rho: normal_kl(loc, rho, None, lambda mu: DiagonalNormal(mu, torch.ones_like(mu)))), kl)
    near(gradient(lambda rho: kl_divergence(DiagonalNormal(loc, scale_from_rho(rho)), DiagonalNormal(loc, one))), kl)
