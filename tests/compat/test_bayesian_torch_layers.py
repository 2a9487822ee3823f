"""The layers under their former names: arguments, tuples, priors, draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers
from bayeformers import NormalPrior, fixed_draw, posterior_mean
from bayeformers import nn as bnn
from bayeformers.compat.bayesian_torch import layers
from bayeformers.compat.bayesian_torch.layers import LinearFlipout, LinearReparameterization, LSTMReparameterization
from bayeformers.compat.bayesian_torch.models.dnn_to_bnn import get_kl_loss
from bayeformers.nn import variational_tensors
from tests.reference import dense_noise, key_of, sigma

NAMES = [name for name in layers.__all__ if name != "VariationalLayer"]


def build(name: str, **options: Any) -> tuple[Any, Tensor]:
    """A layer and an input for it."""
    kind = getattr(layers, name)
    if name.startswith("Linear"):
        return kind(4, 3, **options), torch.randn(5, 4)
    if name.startswith("LSTM"):
        return kind(4, 3, **options), torch.randn(5, 6, 4)
    dims = int(name[name.index("d") - 1])
    return kind(4, 3, 2, **options), torch.randn(5, 4, *[5] * dims)


def plain_of(layer: Any) -> nn.Module:
    """torch's layer with the same means."""
    shape = {
        key: getattr(layer, key)
        for key in ("stride", "padding", "dilation", "groups", "output_padding")
        if hasattr(layer, key) and (key != "output_padding" or "Transpose" in type(layer).__name__)
    }
    if isinstance(layer, nn.Linear):
        plain: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, nn.LSTM):
        plain = nn.LSTM(layer.input_size, layer.hidden_size, bias=layer.bias, batch_first=True)
    else:
        kind = layer.torch_class
        plain = kind(layer.in_channels, layer.out_channels, layer.kernel_size, bias=layer.bias is not None, **shape)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.endswith("_rho")})
    return plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_kl(name: str, bias: bool) -> None:
    """(output, kl): the torch layer's output at the mean, the right KL, one draw per call in both modes."""
    layer, x = build(name, bias=bias)
    assert layer.estimator.name == ("flipout" if name.endswith("Flipout") else "reparameterization")
    with posterior_mean(layer):
        *outputs, kl = layer(x)
        expected = plain_of(layer)(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(tuple(outputs), expected)
    assert torch.equal(kl, layer.kl_loss()) and torch.equal(kl, bayeformers.kl_divergence(layer))
    for mode in (True, False):
        layer.train(mode)
        assert not torch.equal(layer(x)[0], layer(x)[0])
    with fixed_draw(layer, 0):
        first, second = layer(x, return_kl=False), layer(x)[:-1]
        first = first if isinstance(first, tuple) else (first,)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    layer.dnn_to_bnn_flag = True
    assert len(layer(x)) == 2 if name.startswith("LSTM") else isinstance(layer(x), Tensor)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    layer, x = build(name)
    output, *_, kl = layer(x)
    (output.square().sum() + kl).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in layer.parameters())


def test_prior_scale_is_not_variance() -> None:
    """The argument called `prior_variance` is the standard deviation that it was: KL by the formula with s^2."""
    torch.manual_seed(0)
    layer = LinearReparameterization(6, 5, prior_mean=0.3, prior_variance=0.5, posterior_rho_init=-1.0)
    assert layer.prior == NormalPrior(std=0.5, centre=0.3)
    expected = 0.0
    for mu in torch.cat([layer.weight.flatten(), layer.bias]).tolist():
        scale = math.log1p(math.exp(-1.0))
        expected += math.log(0.5 / scale) + (scale**2 + (mu - 0.3) ** 2) / (2 * 0.5**2) - 0.5
    assert float(layer.kl_loss().detach()) == pytest.approx(expected, rel=1e-5)


def test_initial_values_fit_the_fan_in() -> None:
    """Means: torch's own, shifted; scales: softplus(rho_init) exactly, after `reset_parameters` too."""
    torch.manual_seed(0)
    layer = LinearFlipout(400, 30, posterior_mu_init=2.0, posterior_rho_init=-4.0)
    torch.manual_seed(0)
    torch.testing.assert_close(layer.weight - 2.0, nn.Linear(400, 30).weight, rtol=0, atol=1e-6)
    assert (layer.weight_rho == -4.0).all() and (layer.bias_rho == -4.0).all()
    layer.reset_parameters()
    assert (layer.weight_rho == -4.0).all()


CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
GAUSSIANS = ("prior_mean", "prior_variance", "posterior_mu_init", "posterior_rho_init")
ORDERS = {
    name: ("in_features", "out_features", *GAUSSIANS, "bias") if name.startswith("L")
    else (*CONV[:3], *GAUSSIANS, *CONV[3:], "bias") if name == "Conv3dReparameterization"
    else (*CONV, *GAUSSIANS, "bias") if not name.startswith("ConvT")
    else (*CONV[:5], "output_padding", *CONV[5:], *GAUSSIANS, "bias") if name.endswith(("e2dFlipout", "e3dFlipout"))
    else (*CONV, "output_padding", *GAUSSIANS, "bias")
    for name in NAMES
}  # fmt: skip
VALUES = {
    "in_features": 4, "out_features": 2, "in_channels": 4, "out_channels": 2, "kernel_size": 2, "stride": 3,
    "padding": 1, "dilation": 2, "groups": 2, "output_padding": 1, "prior_mean": 0.1, "prior_variance": 0.2,
    "posterior_mu_init": 0.3, "posterior_rho_init": -2.5, "bias": False,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_stand_as_formerly(name: str) -> None:
    kind = getattr(layers, name)
    layer = kind(*[VALUES[argument] for argument in ORDERS[name]])
    by_name = kind(**{argument: VALUES[argument] for argument in ORDERS[name]})
    for each in (layer, by_name):
        assert each.prior == NormalPrior(std=0.2, centre=0.1)
        assert all((tensor.rho == -2.5).all() for tensor in variational_tensors(each))
        assert not any("bias" in key for key in each.state_dict())
        for argument in ORDERS[name]:
            if argument in ("stride", "padding", "dilation", "output_padding"):
                assert set(getattr(each, argument)) == {VALUES[argument]}
            elif argument in ("in_channels", "out_channels", "groups"):
                assert getattr(each, argument) == VALUES[argument]


def test_output_is_that_of_a_drawn_weight() -> None:
    """Under a held draw: F.linear with mu + sigma eps, eps from the reference."""
    layer = LinearReparameterization(4, 3).eval()
    x = torch.randn(5, 4)
    with fixed_draw(layer, 2, seed=8):
        output, _ = layer(x)
    drawn = [
        getattr(layer, n).double()
        + sigma(getattr(layer, f"{n}_rho")) * dense_noise(key_of(8, 2, n), tuple(getattr(layer, n).shape)).double()
        for n in ("weight", "bias")
    ]
    torch.testing.assert_close(output.double(), F.linear(x.double(), *drawn), rtol=1e-5, atol=1e-6)


def test_prediction_is_that_of_one_network() -> None:
    """In `eval()` a Flipout layer too gives equal inputs equal outputs within a call."""
    layer = LinearFlipout(4, 3).eval()
    output, _ = layer(torch.ones(6, 4))
    torch.testing.assert_close(output, output[:1].expand(6, 3))
    training, _ = layer.train()(torch.ones(6, 4))
    assert not torch.allclose(training, training[:1].expand(6, 3))


def test_moments_of_draws_in_eval() -> None:
    """2,000 calls: variance of each output sigma^2 (|x|^2 + 1) within 4 standard errors sqrt(2 / 2000)."""
    torch.manual_seed(0)
    layer = LinearReparameterization(3, 2, posterior_rho_init=0.0).eval()
    x = torch.tensor([[1.0, -2.0, 0.5]])
    with torch.no_grad():
        outputs = torch.stack([layer(x, return_kl=False)[0] for _ in range(2000)]).double()
    variance = math.log(2) ** 2 * (1 + 4 + 0.25 + 1)
    assert (outputs.var(0) / variance - 1).abs().max() < 4 * math.sqrt(2 / 2000)


def test_lstm_states() -> None:
    """States as torch's, (1, B, H); given states may lack the first axis, as formerly."""
    layer, x = LSTMReparameterization(4, 3), torch.randn(5, 6, 4)
    with posterior_mean(layer):
        output, (hidden, cell), _ = layer(x)
        assert hidden.shape == cell.shape == (1, 5, 3) and torch.equal(hidden[0], output[:, -1])
        torch.testing.assert_close(layer(x, (hidden[0], cell[0]))[0], layer(x, (hidden, cell))[0], rtol=0, atol=0)


class Network(nn.Module):
    """A network of such layers as users build it: sums the KLs that its layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = layers.Conv2dReparameterization(
            in_channels=1, out_channels=3, kernel_size=3, stride=1, prior_mean=0.0, prior_variance=1.0,
            posterior_mu_init=0.0, posterior_rho_init=-3.0,
        )  # fmt: skip
        self.fc = layers.LinearFlipout(
            in_features=12, out_features=2, prior_mean=0.0, prior_variance=1.0, posterior_mu_init=0.0,
            posterior_rho_init=-3.0,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kl_sum = 0
        x, kl = self.conv1(x)
        kl_sum += kl
        x = torch.flatten(F.max_pool2d(F.relu(x), 2), 1)
        x, kl = self.fc(x)
        kl_sum += kl
        return F.log_softmax(x, dim=1), kl_sum


def test_hand_built_network() -> None:
    """Its KL is that of the whole model by either name; prediction by `predict` works on it; it trains."""
    model, x, y = Network(), torch.randn(16, 1, 6, 6), torch.randint(2, (16,))
    x[y == 1] += 1.0
    output, kl = model(x)
    torch.testing.assert_close(kl, get_kl_loss(model))
    torch.testing.assert_close(kl, bayeformers.kl_divergence(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        output, kl = model(x)
        loss = F.nll_loss(output, y) + kl / 10_000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_state_dict_round_trip() -> None:
    """torch's names plus rho, which a plain layer of the new package reads too."""
    old, new = LinearReparameterization(4, 3), bnn.Linear(4, 3, prior=NormalPrior(1.0, 0.0))
    new.load_state_dict(old.state_dict())
    assert torch.equal(old.kl_loss(), bayeformers.kl_divergence(new))
