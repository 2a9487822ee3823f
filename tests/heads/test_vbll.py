"""VBLL: its bounds against quadrature, its KL and variances against torch, its regression against the posterior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers.heads import VariationalHead, VBLLConfig
from bayeformers.heads.vbll import jensen_nll, margin_nll
from bayeformers.likelihoods import get_likelihood

D, C = 4, 3


def head(
    covariance: str = "dense", *, bias: bool = True, outputs: int = C, regresses: bool = False, **options: Any
) -> Any:
    """In float64, with values of every tensor that are no start."""
    config = VBLLConfig(covariance=covariance, rank=2, **options)  # type: ignore[arg-type]
    made = VariationalHead(D, outputs, config, is_regression=regresses, bias=bias, dtype=torch.float64)
    torch.manual_seed(0)
    made.reset()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made


def expected_nll(mean: Tensor, variance: Tensor, label: int, points: int = 40) -> float:
    """-E log softmax(f)_y of f ~ N(mean, diag variance), by Gauss-Hermite in every dimension."""
    nodes, weights = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(points))
    grid = torch.cartesian_prod(*[nodes] * len(mean))
    weight = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * len(mean)).prod(-1)
    return -float(weight @ (mean + variance.sqrt() * grid).log_softmax(-1)[:, label])


def expected_softplus(mean: float, variance: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    return float((np.logaddexp(0, mean + math.sqrt(variance) * nodes) * weights).sum() / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    ("mean", "variance"), [((0.0, 0.0), (1.0, 1.0)), ((3.0, -1.0), (0.5, 2.0)), ((0.2, 1.0), (0.0, 4.0))]
)
def test_bounds_of_classes(mean: tuple[float, ...], variance: tuple[float, ...], label: int) -> None:
    """Neither is below the expectation; both are it without variance, where the tight one is the smaller by choice."""
    m, v, y = torch.tensor([mean]).double(), torch.tensor([variance]).double(), torch.tensor([label])
    exact = expected_nll(m[0], v[0], label)
    jensen, margin = float(jensen_nll(m, v, y)), float(margin_nll(m, v, y))
    assert exact <= jensen + 1e-9 and exact <= margin + 1e-9
    others = (m + 0.5 * v - m[:, label : label + 1]).exp()[0, 1 - label]
    assert (margin <= jensen + 1e-12) == bool(others <= 1) or v[0, label] == 0
    certain = -float(m.log_softmax(-1)[0, label])
    assert jensen_nll(m, 0 * v, y).item() == pytest.approx(certain) == margin_nll(m, 0 * v, y).item()


def test_bounds_of_three_classes() -> None:
    m, v = torch.tensor([[0.3, -1.0, 2.0]]).double(), torch.tensor([[0.7, 1.5, 0.2]]).double()
    for label in range(3):
        exact = expected_nll(m[0], v[0], label, points=24)
        for bound in (jensen_nll, margin_nll):
            assert exact <= float(bound(m, v, torch.tensor([label]))) + 1e-6


@pytest.mark.parametrize("bound", ["jensen", "tight"])
def test_bound_of_labels(bound: str) -> None:
    layer, features = head(bound=bound), torch.randn(5, D, dtype=torch.float64)
    labels = torch.randint(0, 2, (5, C)).double()
    values, mask = layer.item_nll(features, {"labels": labels}, get_likelihood("multi_label_classification"))
    mean, variance = layer.mean(features).detach(), layer.variance(features).detach()
    signs = 1 - 2 * labels
    exact = [
        sum(expected_softplus(float(s * m), float(v)) for s, m, v in zip(*rows, strict=True))
        for rows in zip(signs, mean, variance, strict=True)
    ]
    assert mask.all() and all(e <= float(value) + 1e-9 for e, value in zip(exact, values.detach(), strict=True))
    if bound == "tight":
        loose, _ = head().item_nll(features, {"labels": labels}, get_likelihood("multi_label_classification"))
        assert bool((values <= loose).all()) and bool((values < loose).any())


def test_regression_is_exact() -> None:
    """The bound of a Gaussian likelihood is its expectation."""
    layer, features = head(regresses=True, outputs=1), torch.randn(3, D, dtype=torch.float64)
    labels = torch.randn(3, dtype=torch.float64)
    values, _ = layer.item_nll(features, {"labels": labels}, get_likelihood("regression"))
    mean, variance, noise = layer.mean(features)[:, 0], layer.variance(features)[:, 0], layer.noise_variance.item()
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    f = mean[:, None] + variance.sqrt()[:, None] * torch.as_tensor(nodes)
    log_density = torch.distributions.Normal(f, math.sqrt(noise)).log_prob(labels[:, None])
    torch.testing.assert_close(values, -(log_density * torch.as_tensor(weights)).sum(1) / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "dense"])
def test_kl_and_variance(covariance: str, bias: bool) -> None:
    """Against torch's Gaussians and the quadratic form; logits have their noise besides."""
    layer, features = head(covariance, bias=bias), torch.randn(2, 5, D, dtype=torch.float64)
    means = torch.cat([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight
    q = torch.distributions.MultivariateNormal(means, layer.covariances())
    std = layer.prior_std()
    assert std.tolist() == [0.5] * D + [1.0] * bias
    p = torch.distributions.MultivariateNormal(torch.zeros_like(means), std.square().diag_embed())
    kl = torch.distributions.kl_divergence(q, p).sum()
    # p(sigma^2) of a scaled inverse chi-squared: that of 1 / sigma^2 by Gamma(nu / 2, nu s^2 / 2), times sigma^-4
    precision = (-2 * layer.log_noise_std).exp()
    half = torch.tensor(0.5, dtype=torch.float64)
    noise = torch.distributions.Gamma(half, 0.01 * half).log_prob(precision) + 2 * precision.log()
    torch.testing.assert_close(layer.penalty(), kl - noise.sum())
    phi = torch.cat([features, torch.ones(2, 5, 1, dtype=torch.float64)], -1) if bias else features
    expected = torch.einsum("btd,cde,bte->btc", phi, layer.covariances(), phi) + 1 / precision
    torch.testing.assert_close(layer.variance(features), expected)
    torch.testing.assert_close(layer(features), torch.einsum("btd,cd->btc", phi, means))


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "dense"])
def test_gradients(covariance: str) -> None:
    layer, features = head(covariance), torch.randn(4, D, dtype=torch.float64)
    batch, likelihood = {"labels": torch.tensor([0, 2, -100, 1])}, get_likelihood("single_label_classification")
    names = [name for name, _ in layer.named_parameters()]

    def objective(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        parts = torch.func.functional_call(
            _Objective(layer, batch, likelihood), {f"head.{n}": v for n, v in given.items()}, features
        )
        return parts  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(objective, tuple(layer.parameters()))


class _Objective(torch.nn.Module):
    def __init__(self, layer: Any, batch: Any, likelihood: Any) -> None:
        super().__init__()
        self.head, self.batch, self.likelihood = layer, batch, likelihood

    def forward(self, features: Tensor) -> Tensor:
        values, mask = self.head.item_nll(features, self.batch, self.likelihood)
        assert mask.tolist() == [True, True, False, True] and values[2] == 0
        return values.sum() + self.head.penalty()


def test_regression_finds_the_exact_posterior() -> None:
    """The optimum of the bound is the conjugate posterior, and there the loss is -log evidence (Theorem 1)."""
    noise, generator = 0.3, torch.Generator().manual_seed(1)
    layer = head(regresses=True, outputs=1, noise_std=noise)
    features = torch.randn(12, D, dtype=torch.float64, generator=generator)
    labels = torch.randn(12, dtype=torch.float64, generator=generator)
    likelihood = get_likelihood("regression")

    def loss() -> Tensor:
        return layer.item_nll(features, {"labels": labels}, likelihood).sum() + layer.penalty()

    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=0,
                                  line_search_fn="strong_wolfe", history_size=50)  # fmt: skip

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(step)
    phi, std = torch.cat([features, torch.ones(12, 1).double()], 1), layer.prior_std()
    precision = phi.T @ phi / noise**2 + std.square().reciprocal().diag()
    covariance = torch.linalg.inv(precision)
    mean = covariance @ phi.T @ labels / noise**2
    torch.testing.assert_close(layer.covariances()[0].detach(), covariance, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(torch.cat([layer.weight[0], layer.bias]).detach(), mean, rtol=1e-5, atol=1e-8)
    marginal = phi @ std.square().diag() @ phi.T + noise**2 * torch.eye(12).double()
    evidence = torch.distributions.MultivariateNormal(torch.zeros(12).double(), marginal).log_prob(labels)
    torch.testing.assert_close(loss().detach(), -evidence, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "dense"])
def test_draws(covariance: str) -> None:
    """Of 400 draws the standard errors of a mean and a covariance of unit variables are 1/20 and 1/14; 5 of them."""
    layer = head(covariance)
    draws = torch.stack([
        torch.cat([values.reshape(C, -1) for _, values in layer.sampled(i, 3)], 1) for i in range(400)
    ])
    means, covariances = torch.cat([layer.weight, layer.bias[:, None]], 1).detach(), layer.covariances().detach()
    for k in range(C):
        root = torch.linalg.cholesky(covariances[k])
        white = torch.linalg.solve_triangular(root, (draws[:, k] - means[k]).T, upper=False)
        assert white.mean(1).abs().max() < 5 / 20
        assert (torch.cov(white) - torch.eye(D + 1)).abs().max() < 5 / 14
    again = torch.cat([values.reshape(C, -1) for _, values in layer.sampled(7, 3)], 1)
    assert torch.equal(again, draws[7]) and not torch.equal(draws[7], draws[8])
