"""Hamiltonian Monte Carlo: a known Gaussian, reversibility, its order, and R-hat of known chains."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from examples.data.true_posterior import hmc, leapfrog, split_r_hat


def test_hmc_draws_a_known_gaussian() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [-0.3, 0.2, 2.0]], dtype=torch.float64)
    target = MultivariateNormal(mean, scale_tril=root)
    chains = hmc(
        target.log_prob, torch.zeros(64, 3, dtype=torch.float64), num_samples=80, num_warmup=60, num_steps=8,
        step_size=0.3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert chains.draws.shape == (80, 64, 3) and 0.6 < chains.acceptance < 0.95
    for moments, expected in (
        (chains.draws, mean),
        ((chains.draws - mean)[..., None] * (chains.draws - mean)[..., None, :], root @ root.mT),
    ):
        of_chains = moments.mean(0)  # independent between chains, whatever their autocorrelation
        error = of_chains.std(0) / math.sqrt(len(of_chains))
        assert ((of_chains.mean(0) - expected).abs() < 4.5 * error).all()


def test_leapfrog_leads_back_with_the_momentum_negated() -> None:
    def log_density(w: Tensor) -> Tensor:
        return -(w**4).sum(1) - w.prod(1)

    start, momentum = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    slope = -4 * start**3 - start.prod(1, keepdim=True) / start
    position, value, end_slope, end = leapfrog(log_density, start, slope, momentum, 0.05, 20)
    torch.testing.assert_close(value, log_density(position))
    torch.testing.assert_close(end_slope, -4 * position**3 - position.prod(1, keepdim=True) / position)
    assert (position - start).abs().max() > 0.1
    back, _, _, reverse = leapfrog(log_density, position, end_slope, -end, 0.05, 20)
    torch.testing.assert_close(back, start)
    torch.testing.assert_close(reverse, -momentum)

    errors = []  # of the energy, after the same time: of second order in the step
    for step, steps in ((0.01, 20), (0.005, 40)):
        moved, _, _, fast = leapfrog(log_density, start, slope, momentum, step, steps)
        change = 0.5 * (fast.square() - momentum.square()).sum(1) - log_density(moved) + log_density(start)
        errors.append(change.abs().sum().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_r_hat_is_one_for_equal_chains_and_large_for_two_modes() -> None:
    mixed = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    assert split_r_hat(mixed).item() == pytest.approx(1.0, abs=0.01)
    apart = mixed + torch.tensor([0.0, 0.0, 10.0, 10.0])
    # halves: variance 1 within, of their eight means (0, 0, 0, 0, 10, 10, 10, 10) 200 / 7 between
    assert split_r_hat(apart).item() == pytest.approx(math.sqrt(1 + 200 / 7), rel=0.01)
