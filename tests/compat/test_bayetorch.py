"""BayeTorch's layers, ELBO, uncertainty and initialisation, in its call pattern, against formulas written out."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers
from bayeformers import fixed_draw, posterior_mean
from bayeformers.compat.bayetorch.convert import init_bayesian_with_frequentist
from bayeformers.compat.bayetorch.layers import BayesianConv1D, BayesianConv2D, BayesianConv3D, BayesianLinear
from bayeformers.compat.bayetorch.metrics import ELBO, Uncertainty
from bayeformers.compat.bayetorch.models import BayesianModel
from bayeformers.nn import variational_tensors
from tests.reference import dense_noise, key_of

PLAIN = {
    BayesianLinear: nn.Linear,
    BayesianConv1D: nn.Conv1d,
    BayesianConv2D: nn.Conv2d,
    BayesianConv3D: nn.Conv3d,
}


class Network(BayesianModel):
    """LeNet's shape in small, built as BayeTorch's models are: logits and the KL."""

    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = BayesianConv2D(1, 4, 3)
        self.features = nn.ModuleList([BayesianLinear(36, 8)])
        self.fc = BayesianLinear(8, n_classes)

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor]:
        X = torch.max_pool2d(torch.relu(self.conv1(X)), 2)
        X = torch.relu(self.features[0](X.view(X.size(0), -1)))
        return self.fc(X), self.kl_divergence


class Frequentist(nn.Module):
    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.features = nn.ModuleList([nn.Linear(36, 8)])
        self.fc = nn.Linear(8, n_classes)

    def forward(self, X: Tensor) -> Tensor:
        X = torch.max_pool2d(torch.relu(self.conv1(X)), 2)
        return self.fc(torch.relu(self.features[0](X.view(X.size(0), -1))))


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 1, 8, 8)


# --------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PLAIN)
def test_layer(kind: Any, bias: bool) -> None:
    """Output at the mean, KL n/2 log(1 + exp(5)) less what weights below the floor save, a bias without noise."""
    dims = 0 if kind is BayesianLinear else int(kind.__name__[-2])
    arguments = (3, 4) if dims == 0 else (4, 6, 2, 2, 1, 1, 2)
    layer, plain = kind(*arguments, bias=bias), PLAIN[kind](*arguments, bias=bias)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    x = torch.randn(5, arguments[0], *[6] * dims)
    with posterior_mean(layer):
        assert torch.equal(layer(x), plain(x))
    assert layer.W is layer.weight and layer.b is layer.bias and layer.log_alpha.shape == layer.W.shape
    torch.testing.assert_close(layer.log_alpha, torch.full_like(layer.W, -5.0))
    means, floor = layer.W.detach().abs().double(), float(layer.scale_floor("weight"))
    expected = 0.5 * torch.log1p(math.exp(5) * (means / means.clamp_min(floor)).square()).sum()
    assert layer.kl_divergence.item() == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) <= means.numel() / 2 * math.log1p(math.exp(5))
    assert [name for name, _ in layer.named_parameters() if "rho" in name] == ["weight_rho"]
    for mode in (True, False):
        layer.train(mode)
        assert layer(x).shape == plain(x).shape and not torch.equal(layer(x), layer(x))
        zero = torch.zeros_like(x)
        assert torch.isfinite(layer(zero)).all()
        torch.testing.assert_close(layer(zero), plain(zero))  # an input of zeros leaves the bias


def test_groups() -> None:
    """`groups` of a convolution: each output channel sees its own inputs."""
    layer = BayesianConv2D(4, 4, 3, groups=4)
    assert layer.W.shape == (4, 1, 3, 3) and layer(torch.randn(2, 4, 5, 5)).shape == (2, 4, 3, 3)


def test_scale_is_multiplicative() -> None:
    """sigma^2 = alpha mu^2 where |mu| is above the floor, whatever mu becomes; zeros keep some noise."""
    layer = BayesianLinear(50, 40).eval()
    with torch.no_grad():
        layer.W[0] = 0.0
        layer.W[1] *= 3.0
    eps = dense_noise(key_of(0, 0, "weight"), (40, 50)).double()
    with fixed_draw(layer, 0), torch.no_grad():
        weight = (layer(torch.eye(50)) - layer.bias).T.double()
    floor = float(layer.scale_floor("weight"))
    assert floor > 0
    scale = math.exp(-2.5) * layer.W.detach().double().abs().clamp_min(floor)
    torch.testing.assert_close(weight, layer.W.detach().double() + scale * eps, rtol=1e-4, atol=1e-6)
    assert weight[0].abs().min() > 0


def test_kl_by_formula() -> None:
    """1/2 sum log(1 + mu^2 / sigma^2) with trained alphas, in float64; gradient to means and scales."""
    layer = BayesianLinear(20, 10).double()
    with torch.no_grad():
        layer.weight_rho.normal_(-2.0, 1.0)
    floor = float(layer.scale_floor("weight"))
    total = 0.0
    for mu, log_alpha in zip(layer.W.flatten().tolist(), layer.log_alpha.flatten().tolist(), strict=True):
        variance = math.exp(log_alpha) * max(abs(mu), floor) ** 2
        total += 0.5 * math.log1p(mu**2 / variance)
    assert layer.kl_divergence.item() == pytest.approx(total, rel=1e-6)
    layer.kl_divergence.backward()
    assert layer.weight_rho.grad is not None and bool(layer.weight_rho.grad.abs().sum() > 0)


# ----------------------------------------------------------------------------------------------------------------- ELBO


def test_training_in_the_former_pattern() -> None:
    """Logits and KL from the model, log-mean-exp over a draw axis, ELBO, Adam: the loss falls."""
    X, Y = images(32), torch.randint(3, (32,))
    X[Y == 1] += 2.0
    X[Y == 2] -= 2.0
    model, criterion = Network(), ELBO(n_samples=32)
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optim.zero_grad()
        y, kld = model(X)
        y = F.log_softmax(y, dim=1)
        log_y = ELBO.log_mean_exp(y.unsqueeze(len(y.shape)), dim=2)
        loss = criterion(log_y, Y, kld, kld_weight=0.01)
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_elbo_is_n_times_the_new_objective() -> None:
    log_probs, labels = torch.randn(6, 3).log_softmax(-1), torch.randint(3, (6,))
    kl = torch.tensor(4.0)
    expected = 50 * (-sum(float(log_probs[i, y]) for i, y in enumerate(labels.tolist())) / 6 + 0.5 * 4.0 / 50)
    assert float(ELBO(50)(log_probs, labels, kl, 0.5)) == pytest.approx(expected, rel=1e-5)
    zeros = ELBO(n_samples=32)(torch.zeros(32, 2), torch.zeros(32, dtype=torch.long), torch.zeros(32, 1))
    assert zeros.sum() == 0.0


@pytest.mark.parametrize(("dim", "keepdim"), [(None, False), (0, False), (1, True), (-1, False)])
def test_log_mean_exp(dim: int | None, keepdim: bool) -> None:
    x = torch.randn(3, 4, dtype=torch.float64) * 5
    expected = x.exp().mean().log() if dim is None else x.exp().mean(dim, keepdim=keepdim).log()
    torch.testing.assert_close(ELBO.log_mean_exp(x, dim, keepdim), expected)
    assert ELBO.log_mean_exp(torch.full((2,), -1e4)) == -1e4


def test_nested_layers_count_in_the_kl() -> None:
    model = Network()
    parts = [model.conv1, model.features[0], model.fc]
    total = sum(part.kl_divergence for part in parts)  # type: ignore[union-attr, misc]
    torch.testing.assert_close(model.kl_divergence, total)
    assert torch.equal(model.kl_divergence, bayeformers.kl_divergence(model))


# ---------------------------------------------------------------------------------------------------------- uncertainty


def by_hand(model: nn.Module, x: Tensor, samples: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The sums over draws of one example, in NumPy."""
    seed = int(torch.randint(2**62, ()).item())
    probs = []
    for index in range(samples):
        with fixed_draw(model, index, seed), torch.no_grad():
            z = model(x[None])[0][0].double().numpy()
        p = np.log1p(np.exp(z))
        probs.append(p / p.sum())
    p = np.stack(probs)
    centred = p - p.mean(0)
    epistemic = sum(np.outer(c, c) for c in centred) / samples
    aleatoric = np.diag(p.mean(0)) - sum(np.outer(q, q) for q in p) / samples
    return epistemic, aleatoric, int(p.mean(0).argmax())


@pytest.mark.parametrize("training", [True, False])
def test_uncertainty(training: bool) -> None:
    """One example as formerly, and a batch: the same numbers; both parts sum to diag(p) - p p^T."""
    model, x = Network().train(training), images(4)
    uncertainty, batched = Uncertainty(16), Uncertainty(16, batched=True)
    torch.manual_seed(3)
    epistemic, aleatoric, prediction = batched(model, x)
    assert epistemic.shape == aleatoric.shape == (4, 3, 3) and prediction.shape == (4,)
    for i in range(4):
        torch.manual_seed(3)
        single = uncertainty(model, x[i])
        torch.manual_seed(3)
        expected = by_hand(model, x[i], 16)
        for one, many, hand in zip(single, (epistemic[i], aleatoric[i], prediction[i]), expected, strict=True):
            np.testing.assert_allclose(np.asarray(one), np.asarray(many), atol=1e-6)
            np.testing.assert_allclose(np.asarray(one), hand, atol=1e-6)
        assert isinstance(single.prediction, int) and float(single.epistemic.trace()) > 0
    assert model.training is training


# ------------------------------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("freeze", [True, False])
def test_init_with_frequentist(freeze: bool) -> None:
    """The mean of the twin is the trained network; nothing is shared; alpha starts at exp(-5) of the new means."""
    trained = Frequentist()
    kept = copy.deepcopy(trained.state_dict())
    twin = Network()
    assert init_bayesian_with_frequentist(twin, trained, freeze) is twin
    x = images()
    with posterior_mean(twin):
        assert torch.equal(twin(x)[0], trained(x))
    for tensor in variational_tensors(twin):
        assert tensor.rho.requires_grad
        floor = float(tensor.module.scale_floor(tensor.parameter_name))  # type: ignore[arg-type]
        assert floor == pytest.approx(0.1 * float(tensor.loc.detach().abs().mean()), rel=1e-4)
        torch.testing.assert_close(
            tensor.scale() / tensor.loc.abs().clamp_min(floor),
            torch.full_like(tensor.loc, math.exp(-2.5)),
            rtol=1e-4,
            atol=0,
        )
    means = [p for name, p in twin.named_parameters() if not name.endswith("_rho")]
    assert all(p.requires_grad is not freeze for p in means)
    with torch.no_grad():
        for parameter in means:
            parameter.add_(1.0)
    assert all(torch.equal(value, kept[name]) for name, value in trained.state_dict().items())


def test_init_as_a_method() -> None:
    trained = Frequentist()
    twin = Network().init_with_frequentist(trained, False)
    assert isinstance(twin, Network) and torch.equal(twin.fc.W, trained.fc.weight)
