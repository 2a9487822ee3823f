"""Convolutions and multiplicative scales: each property against the formula that broke it elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import fixed_draw, to_bayesian
from tests.reference import dense_noise, key_of, sigma


def drawn(layer: nn.Module, name: str) -> Tensor:
    """mu + sigma eps of draw 0, eps from the reference."""
    loc, rho = layer.get_parameter(name).detach(), layer.get_parameter(f"{name}_rho")
    return loc + sigma(rho) * dense_noise(key_of(0, 0, name), tuple(loc.shape)).double()


@pytest.mark.protects("groups")
def test_groups() -> None:
    """Every group of channels has a kernel of its own; one kernel over all channels is another layer."""
    torch.manual_seed(0)
    layer = bnn.Conv2d(4, 6, (3, 2), groups=2, delta=0.5, dtype=torch.float64).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight, bias = drawn(layer, "weight"), drawn(layer, "bias")

    def check(output: Tensor) -> None:
        expected = [F.conv2d(x[:, 2 * g :][:, :2], weight[3 * g :][:3], bias[3 * g :][:3]) for g in (0, 1)]
        torch.testing.assert_close(output, torch.cat(expected, 1), rtol=1e-6, atol=1e-6)

    with fixed_draw(layer, 0):
        check(layer(x).detach())
    with pytest.raises(AssertionError):
        check(F.conv2d(x, weight.repeat(1, 2, 1, 1), bias))


@pytest.mark.protects("multiplicative_zero")
def test_multiplicative_zero() -> None:
    """Of sigma^2 = alpha mu^2 a weight at 0 has noise too, and its scale a gradient, by the floor under |mu|."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        layer.weight[1] = 0.0
    to_bayesian(layer, delta=0.3, scale="multiplicative")

    def check(scale: Tensor) -> None:
        (slope,) = torch.autograd.grad(scale.sum(), layer.weight_rho)
        assert bool((scale > 0).all() and (slope != 0).all())

    check(layer.variational("weight").scale)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        check(F.softplus(layer.weight_rho) * layer.weight.abs())
