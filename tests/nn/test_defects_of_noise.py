"""Draws and estimators: each property against the formula that broke it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import to_bayesian
from tests.reference import sigma, sigma_slope

EYE = torch.eye(4, dtype=torch.float64)


class Refilled(nn.Module):
    """A random Linear whose noise lives in one buffer that every forward fills anew, in `eval()` too."""

    def __init__(self, layer: bnn.Linear) -> None:
        super().__init__()
        self.weight, self.weight_rho = layer.weight, layer.weight_rho
        self.register_buffer("eps", torch.zeros_like(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        self.eps.data.normal_()
        return F.linear(x, self.weight + F.softplus(self.weight_rho.double()) * self.eps)


def linear(outputs: int = 3, estimator: str = "reparameterization") -> bnn.Linear:
    torch.manual_seed(0)
    return bnn.Linear(4, outputs, bias=False, delta=0.5, dtype=torch.float64, estimator=estimator)


@pytest.mark.protects("noise_is_fresh")
def test_noise_is_fresh() -> None:
    """Three forwards before one backward: each is differentiated with its own noise, read off its own weights.

    With inputs I an output is W^T; of sum W^2 / 2 the slope is W eps sigmoid(rho), eps = (W - mu) / sigma.
    """

    def check(layer: nn.Module) -> None:
        weights = [layer(EYE).T for _ in range(3)]
        (found,) = torch.autograd.grad(sum(w.square().sum() / 2 for w in weights), layer.weight_rho)  # type: ignore[arg-type]
        scale, slope = sigma(layer.weight_rho), sigma_slope(layer.weight_rho)  # type: ignore[arg-type]
        expected = sum(w.detach() * (w - layer.weight).detach() / scale * slope for w in weights)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)

    check(linear().train())
    with pytest.raises(AssertionError):
        check(Refilled(linear()))


@pytest.mark.protects("mean_mode")
def test_mean_mode() -> None:
    """`eval()` gives the posterior mean, the same every time."""
    layer = linear()

    def check(module: nn.Module) -> None:
        module.eval()
        for _ in range(2):
            torch.testing.assert_close(module(EYE), layer.weight.T, rtol=0, atol=0)

    check(layer)
    with pytest.raises(AssertionError):
        check(Refilled(layer))


class SignsPerToken(nn.Module):
    """Flipout with signs of the shape of the input, so that every token has a weight draw of its own."""

    def __init__(self, layer: bnn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        noise = sigma(self.layer.weight_rho) * torch.randn(self.layer.weight.shape, dtype=torch.float64)
        mean = F.linear(x, self.layer.weight)
        r, t = (torch.randint(2, like.shape) * 2.0 - 1 for like in (x, mean))
        return mean + F.linear(x * r, noise) * t


@pytest.mark.protects("flipout_signs_per_example")
def test_flipout_signs_per_example() -> None:
    """The mean over 20 tokens has the variance of one weight draw, xbar^2 sigma^2, not a twentieth of it.

    It is Gaussian, so a variance over n = 4,000 forwards has relative sd sqrt(2 / n); 4.5 of them, 3 outputs.
    """
    layer = linear(estimator="flipout").train()
    x = 1 + torch.randn(1, 20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 10
    expected = (x.mean(1).square() @ sigma(layer.weight_rho).square().T)[0]

    @torch.no_grad()
    def check(layer: nn.Module) -> None:
        pooled = torch.stack([layer(x).mean(1)[0] for _ in range(4000)])
        torch.testing.assert_close(pooled.var(0), expected, rtol=4.5 * math.sqrt(2 / 4000), atol=0)

    check(layer)
    with pytest.raises(AssertionError):
        check(SignsPerToken(layer))


@pytest.mark.protects("flipout_signs_per_example")
def test_signs_are_never_zero() -> None:
    """Signs are -1 or 1; the sign of a uniform number is 0 where that is 0, which happens to one that is rounded."""
    shape = (200, 200)

    def check(signs: Tensor) -> None:
        assert bool((signs.abs() == 1).all())

    torch.manual_seed(0)
    weight = linear().train().variational("weight")
    check(weight.draw.signs(weight.spec, 0, shape, torch.device("cpu")).bfloat16())
    with pytest.raises(AssertionError):
        check((2 * torch.rand(shape).bfloat16() - 1).sign())


def local_noise(layer: bnn.Linear, shape: Callable[[Tensor], torch.Size]) -> Callable[[Tensor], Tensor]:
    """Local reparameterization with noise of a shape of its own."""

    def forward(x: Tensor) -> Tensor:
        scale = F.linear(x.square(), sigma(layer.weight_rho).square()).sqrt()
        return F.linear(x, layer.weight) + scale * torch.randn(shape(scale), dtype=torch.float64)

    return forward


@pytest.mark.protects("local_noise_per_position")
def test_local_noise_per_position() -> None:
    """Every output element has noise of its own: two positions of one example are uncorrelated, with the right spread.

    Over n = 4,000 forwards a correlation of 0 has sd 1 / sqrt(n), a variance relative sd sqrt(2 / n); 4.5 of them.
    """
    layer = linear(estimator="local_reparameterization").train()
    x = torch.ones(1, 2, 4, dtype=torch.float64)
    expected = sigma(layer.weight_rho).square().sum(1)

    @torch.no_grad()
    def check(forward: Callable[[Tensor], Tensor]) -> None:
        first, second = torch.stack([forward(x)[0] for _ in range(4000)]).unbind(1)
        torch.testing.assert_close(first.var(0), expected, rtol=4.5 * math.sqrt(2 / 4000), atol=0)
        together = torch.corrcoef(torch.cat([first, second], 1).T)[:3, 3:]
        assert float(together.abs().max()) < 4.5 / math.sqrt(4000)

    check(layer)
    with pytest.raises(AssertionError):
        check(local_noise(layer, lambda scale: torch.Size([1, 1, scale.shape[-1]])))


@pytest.mark.protects("half_precision_zero_input")
def test_half_precision_zero_input() -> None:
    """An input of zeros has output variance 0, where the square root's slope is infinite: 16 bits keep it finite."""

    def check(forward: Callable[[Tensor, Tensor], Tensor], rho: Tensor) -> None:
        x = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
        found = torch.autograd.grad(forward(x, rho).sum(), [x, rho])
        assert all(bool(gradient.isfinite().all()) for gradient in found)

    layer = bnn.Linear(4, 3, estimator="local_reparameterization", dtype=torch.float16).train()
    check(lambda x, rho: layer(x), layer.weight_rho)

    def with_a_tiny_constant(x: Tensor, rho: Tensor) -> Tensor:
        variance = F.linear(x.square(), F.softplus(rho).square().half()) + 1e-8  # which is 0 in float16
        return variance.sqrt() * torch.randn(variance.shape).half()

    with pytest.raises(AssertionError):
        check(with_a_tiny_constant, layer.weight_rho)


class Twice(nn.Module):
    """One weight, used twice: y = w w x."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(self.layer(x))
        return output


@pytest.mark.protects("one_draw_per_forward")
def test_one_draw_per_forward() -> None:
    """A weight that is used twice in a forward is squared, and so not negative; two draws multiply to either sign."""

    @torch.no_grad()
    def check(model: nn.Module) -> None:
        x = torch.ones(1, 1, dtype=torch.float64)
        assert all(float(model(x)) >= 0 for _ in range(200))

    torch.manual_seed(0)
    plain = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        plain.weight.fill_(0.1)
    check(to_bayesian(Twice(plain), delta=10.0).train())
    with pytest.raises(AssertionError):
        check(Twice(bnn.Linear(1, 1, bias=False, delta=10.0, dtype=torch.float64)).train())  # each call is on its own
