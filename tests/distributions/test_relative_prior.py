"""`RelativePrior`: the KL of the scales alone, wherever the means go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayeformers
from bayeformers import RelativePrior
from bayeformers.distributions import prior_from_dict
from bayeformers.nn import variational_tensors


def converted(scale: str, ratio: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Linear(5, 3, bias=False).double()
    return bayeformers.to_bayesian(net, 0.3, freeze=False, prior=RelativePrior(ratio), scale=scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["additive", "multiplicative"])
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_kl_is_that_of_the_relative_scales(scale: str, ratio: float) -> None:
    """With u = sigma / (r delta max(|mu|, floor)): the sum of u^2 / 2 - 1/2 - log u, after the means moved.

    The floor is 0.1 mean|mu| of the present means, or where the scale is multiplicative of those at the conversion.
    """
    net = converted(scale, ratio)
    tensor = next(variational_tensors(net))
    start = tensor.loc.detach().clone()
    with torch.no_grad():
        tensor.loc.mul_(-3.0)
        tensor.rho.add_(0.4)
    mu = tensor.loc.detach()
    floor = 0.1 * (mu if scale == "additive" else start).abs().mean()
    u = tensor.scale().detach() / (ratio * 0.3 * torch.maximum(mu.abs(), floor))
    expected = (u.square() / 2 - 0.5 - u.log()).sum()
    kl = bayeformers.kl_divergence(net)
    torch.testing.assert_close(kl.detach().double(), expected, rtol=1e-6, atol=0)  # its floor is float32
    kl.backward()
    assert tensor.loc.grad is None
    slope = torch.sigmoid(tensor.rho.detach().double())  # d softplus
    relative = torch.nn.functional.softplus(tensor.rho.detach().double())
    torch.testing.assert_close(tensor.rho.grad, ((u.square() - 1) / relative * slope).float())


def test_it_is_zero_at_first_and_a_mean_that_moves_costs_nothing() -> None:
    net = converted("multiplicative")
    assert abs(float(bayeformers.kl_divergence(net))) < 1e-9
    with torch.no_grad():
        next(variational_tensors(net)).loc.mul_(100.0)
    assert abs(float(bayeformers.kl_divergence(net))) < 1e-9


def test_a_trained_mean_is_that_of_the_likelihood() -> None:
    """Regression with one weight per output: the noise of the weight adds a ridge, the prior nothing."""
    torch.manual_seed(0)
    x, net = torch.randn(200, 5, dtype=torch.float64), converted("additive")
    target = x @ torch.randn(3, 5, dtype=torch.float64).mT
    optimizer = torch.optim.Adam([p for name, p in net.named_parameters() if not name.endswith("_rho")], lr=0.05)
    with bayeformers.posterior_mean(net):
        for _ in range(400):
            loss = (net(x) - target).square().mean() + 10 * bayeformers.kl_divergence(net)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float((net(x) - target).square().mean()) < 1e-6


def test_json_round_trip_and_bad_numbers() -> None:
    assert prior_from_dict(RelativePrior(0.5).to_dict()) == RelativePrior(0.5)
    for wrong in (0.0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="`relative_scale`"):
            RelativePrior(wrong)  # type: ignore[arg-type]
