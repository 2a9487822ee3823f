"""Block by block: value and gradients of the whole expression in float64, whatever the blocks and the padding row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import ARDPrior, DoubleExponentialPrior, LogUniformPrior, ScaleMixturePrior, kl_divergence, to_bayesian
from bayeformers.distributions import DiagonalNormal, InitialScale
from bayeformers.distributions import kl_divergence as kl_of

PRIORS = [
    ARDPrior(), LogUniformPrior(), DoubleExponentialPrior(0.3), DoubleExponentialPrior(0.3, centre=0.1),
    ScaleMixturePrior(0.3, 0.5, 0.1, quadrature=5),
]  # fmt: skip


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
@pytest.mark.parametrize(("padding_idx", "freeze"), [(None, False), (3, False), (0, True)])
def test_large_table(prior: Any, padding_idx: int | None, freeze: bool) -> None:
    """180,000 weights, three blocks; float32 against one float64 expression over all of them."""
    torch.manual_seed(0)
    model = to_bayesian(nn.Embedding(300, 600, padding_idx=padding_idx), 0.3, freeze=freeze, prior=prior)
    w0 = model.weight.detach().clone()
    with torch.no_grad():
        model.weight_rho.add_(torch.randn_like(w0), alpha=0.3)
        if not freeze:
            model.weight.add_(torch.randn_like(w0), alpha=0.05)
    found = kl_divergence(model)
    (2 * found).backward()
    rows = [r for r in range(300) if r != padding_idx]
    mu, rho = (p.detach().double().requires_grad_() for p in (model.weight, model.weight_rho))
    density = prior.for_tensor(w0.double()[rows], InitialScale.of(w0.double(), 0.3))
    expected = kl_of(DiagonalNormal(mu[rows], nn.functional.softplus(rho)[rows]), density)
    (2 * expected).backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(model.weight_rho.grad.double(), rho.grad, rtol=1e-3, atol=1e-5)
    if freeze:
        assert model.weight.grad is None
    else:
        torch.testing.assert_close(model.weight.grad.double(), mu.grad, rtol=1e-3, atol=1e-4)
    if padding_idx is not None:
        assert not model.weight_rho.grad[padding_idx].any()


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_twice_through_one_graph(prior: Any) -> None:
    """A second backward gives the same gradient, and without gradients there is only the value."""
    model = to_bayesian(nn.Linear(3, 2), 0.3, freeze=False, prior=prior)
    kl = kl_divergence(model)
    first = torch.autograd.grad(kl, [model.weight_rho, model.bias], retain_graph=True)
    again = torch.autograd.grad(kl, [model.weight_rho, model.bias])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        assert torch.equal(kl_divergence(model), kl.detach())
