"""E log|x + z| against quadrature, Dawson's integral and Molchanov et al.'s approximation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.special import dawsn

from bayeformers.distributions.log_moment import log_moment

AT_0 = -0.5 * (math.log(2) + float(np.euler_gamma))
POINTS = [1e-8, 1e-4, 0.01, 0.3, 1.0, 2.5, 6.0, 9.0, 9.999999, 10.0, 10.5, 14.0, 40.0]


def exact(x: float) -> float:
    """E log|x + z| - E log|z|: the logarithm's singularity at z = -x is an end of each piece."""

    def density(z: float) -> float:
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    lower, upper = min(-40.0, -x - 1), max(40.0, -x + 1)
    pieces = sorted({lower, -x - 1, -x, -x + 1, -3.0, 0.0, 3.0, upper})
    total = 0.0
    for a, b in zip(pieces, pieces[1:], strict=False):
        total += integrate.quad(
            lambda z: density(z) * math.log(abs(x + z)) if z != -x else 0.0, a, b, epsabs=1e-14, epsrel=1e-13, limit=500
        )[0]
    return total - AT_0


@pytest.mark.parametrize("x", [0.0, 0.01, 0.3, 1.0, 2.5, 6.0, 9.9, 10.1, 14.0])
def test_value_is_the_expectation(x: float) -> None:
    assert float(log_moment(torch.tensor([x], dtype=torch.float64))) == pytest.approx(exact(x), abs=1e-11)


@pytest.mark.parametrize("x", POINTS)
def test_value_is_the_integral_of_dawson(x: float) -> None:
    """2 int_0^y D, y = x / sqrt 2, relative to the value: small x too."""
    expected = 2 * integrate.quad(dawsn, 0, x / math.sqrt(2), epsabs=0, epsrel=1e-13, limit=500)[0]
    assert float(log_moment(torch.tensor([-x], dtype=torch.float64))) == pytest.approx(expected, rel=2e-13)


@pytest.mark.parametrize("x", [0.0, *POINTS, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_is_dawson(x: float, dtype: torch.dtype) -> None:
    """sqrt 2 D(x / sqrt 2), odd."""
    leaf = torch.tensor([x, -x], dtype=dtype, requires_grad=True)
    log_moment(leaf).sum().backward()
    expected = math.sqrt(2) * dawsn(np.asarray(leaf.detach().double()) / math.sqrt(2))
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(leaf.grad.double().numpy(), expected, rtol=rtol, atol=1e-30)


def test_float32_agrees_with_float64() -> None:
    """Over 12 decades, across the switch; within a few roundings of the value."""
    x = torch.logspace(-5, 7, 4001)
    torch.testing.assert_close(log_moment(x).double(), log_moment(x.double()), rtol=2e-6, atol=1e-12)


def test_large_x_is_a_logarithm() -> None:
    """log x + (log 2 + gamma) / 2 - 1 / (2 x^2)."""
    for x in (1e3, 1e6, 1e12):
        found = float(log_moment(torch.tensor([x], dtype=torch.float64)))
        assert found == pytest.approx(math.log(x) - AT_0 - 0.5 / x**2, rel=1e-12)


def test_molchanov_is_near() -> None:
    """Their fit, -KL = k1 sigmoid(k2 + k3 log alpha) - log(1 + 1 / alpha) / 2 - k1, is within 0.02 at every alpha.

    Molchanov et al. 2017 (arXiv 1701.05369), equation 14: it also fixes our constant, as both are 0 for alpha -> inf.
    """
    log_alpha = torch.linspace(-12, 12, 401, dtype=torch.float64)
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    theirs = -(k1 * torch.sigmoid(k2 + k3 * log_alpha) - 0.5 * torch.log1p((-log_alpha).exp()) - k1)
    torch.testing.assert_close(log_moment((-0.5 * log_alpha).exp()), theirs, rtol=0, atol=0.02)


def test_gradcheck() -> None:
    x = torch.tensor([-11.0, -3.0, -0.2, 0.0, 0.7, 9.5, 10.3, 50.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(log_moment, (x,))


def test_empty() -> None:
    assert log_moment(torch.zeros(0, 3)).shape == (0, 3)
