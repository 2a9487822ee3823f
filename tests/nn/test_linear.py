"""`Linear` and `Conv1D` by hand: torch's arguments and shapes, exact gradients, and casts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import bayeformers.nn as bnn
from bayeformers import NormalPrior, fixed_draw, kl_divergence
from bayeformers.nn.variational import Draw, sample
from tests.reference import dense_noise, key_of, moped_sigma, sigma, sigma_slope


@pytest.mark.protects("fan_in_init")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_like_torch(bias: bool, dtype: torch.dtype) -> None:
    """Same attributes, initialisation, state-dict names and outputs as `nn.Linear` in `eval()`; rho float32."""
    torch.manual_seed(0)
    layer = bnn.Linear(4, 3, bias=bias, dtype=dtype).eval()
    torch.manual_seed(0)
    plain = nn.Linear(4, 3, bias=bias, dtype=dtype)
    state = layer.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state.pop(name), value)
    assert set(state) == ({"weight_rho", "bias_rho"} if bias else {"weight_rho"})
    assert all(value.dtype == torch.float32 for value in state.values())
    x = torch.randn(2, 5, 4, dtype=dtype)
    assert torch.equal(layer(x), plain(x)) and layer.train()(x).shape == (2, 5, 3)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_output_and_gradients_of_a_draw(kind: str) -> None:
    """y = x W + b with W = mu + sigma eps: value and all gradients, eps from the reference."""
    layer: Any = bnn.Linear(4, 3, dtype=torch.float64) if kind == "linear" else bnn.Conv1D(3, 4).double()
    x, upstream = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    with fixed_draw(layer.train(), 2, seed=8):
        output = layer(x)
        output.backward(upstream)
    leaves = {}
    for name in ("weight", "bias"):
        eps = dense_noise(key_of(8, 2, name), tuple(getattr(layer, name).shape)).double()
        value = getattr(layer, name).detach() + sigma(getattr(layer, f"{name}_rho")) * eps
        leaves[name] = (value.requires_grad_(), eps)
    weight, bias = leaves["weight"][0], leaves["bias"][0]
    expected = F.linear(x, weight if kind == "linear" else weight.T, bias)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    gradients = torch.autograd.grad(expected, [weight, bias], upstream)
    for (name, (_, eps)), gradient in zip(leaves.items(), gradients, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, gradient, rtol=1e-6, atol=1e-7)
        by_rho = (gradient * eps * sigma_slope(getattr(layer, f"{name}_rho"))).float()
        torch.testing.assert_close(getattr(layer, f"{name}_rho").grad, by_rho, rtol=1e-5, atol=1e-6)


def test_conv1d_is_transformers() -> None:
    torch.manual_seed(0)
    layer = bnn.Conv1D(3, 4).eval()
    torch.manual_seed(0)
    assert isinstance(layer, Conv1D) and torch.equal(layer(torch.ones(2, 4)), Conv1D(3, 4)(torch.ones(2, 4)))


def test_sample_is_differentiable_everywhere() -> None:
    """`sample` against finite differences, by autograd's own check; zero slope below the floor of sigma."""
    loc, rho = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    eps = torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda mu, r: sample(mu, r, eps), (loc, rho))
    for value in (-200.0, -50.0, 200.0, 19.9, 20.1):
        rho = torch.full((3,), value, requires_grad=True)
        w = sample(torch.zeros(3), rho, torch.tensor([1.0, -2.0, 0.5]))
        w.sum().backward()
        expected = torch.tensor([1.0, -2.0, 0.5]).double() * sigma_slope(rho)
        torch.testing.assert_close(rho.grad.double(), expected, rtol=1e-6, atol=0)  # type: ignore[union-attr]
        torch.testing.assert_close(
            w.detach().double(), torch.tensor([1.0, -2.0, 0.5]).double() * sigma(rho), rtol=1e-6, atol=0
        )


def test_sample_under_vmap() -> None:
    """`torch.func.vmap` over stacked models works: an ensemble in one call."""
    loc, rho, eps = torch.randn(7, 3, 4), torch.randn(7, 3, 4), torch.randn(3, 4)
    stacked = torch.func.vmap(lambda mu, r: sample(mu, r, eps))(loc, rho)
    torch.testing.assert_close(stacked, torch.stack([sample(mu, r, eps) for mu, r in zip(loc, rho, strict=True)]))


def test_moments_of_training_draws() -> None:
    """2,000 forwards: mean mu and variance sigma^2 of each weight's output, within 4 standard errors."""
    torch.manual_seed(0)
    layer = bnn.Linear(3, 1, bias=False, delta=0.5).train()
    with torch.no_grad():
        outputs = torch.stack([layer(torch.eye(3)).squeeze(-1) for _ in range(2000)]).double()
    scale = sigma(layer.weight_rho)[0]
    assert ((outputs.mean(0) - layer.weight.detach().double()[0]).abs() < 4 * scale / math.sqrt(2000)).all()
    assert ((outputs.var(0) / scale.square() - 1).abs() < 4 * math.sqrt(2 / 2000)).all()
    correlation = torch.corrcoef(outputs.T)
    assert (correlation - torch.eye(3)).abs().max() < 4 / math.sqrt(2000)


def test_reset_parameters() -> None:
    """New means bring new scales with them."""
    layer = bnn.Linear(4, 3, delta=0.1)
    with torch.no_grad():
        layer.weight_rho.fill_(0.0)
    layer.reset_parameters()
    expected = moped_sigma(layer.weight, 0.1)
    torch.testing.assert_close(sigma(layer.weight_rho), expected, rtol=1e-5, atol=1e-9)


def test_repr_and_prior() -> None:
    layer = bnn.Linear(4, 3, prior=NormalPrior(0.5, 0.0))
    assert "in_features=4" in repr(layer) and "NormalPrior(std=0.5" in repr(layer)
    assert torch.isfinite(kl_divergence(layer))


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match=r"`estimator`.*reparameterization.*'flipot'"):
        bnn.Linear(4, 3, estimator="flipot")


def test_held_draw_caches_and_follows() -> None:
    """Without gradients a held draw makes a weight once and again after it changed; `nbytes` says what it keeps."""
    layer = bnn.Linear(4, 3).eval()
    x = torch.randn(2, 4)
    with torch.no_grad(), fixed_draw(layer, 0):
        layer(x)
        assert isinstance(layer.draw, Draw)
        assert layer.draw.nbytes == 15 * 4
        kept: Tensor = layer.variational("weight").sample()
        assert layer.variational("weight").sample() is kept
        layer.get_parameter("weight").mul_(2)
        assert layer.variational("weight").sample() is not kept
