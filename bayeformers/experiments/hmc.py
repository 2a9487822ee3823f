"""Hamiltonian Monte Carlo on many chains at once: draws of a small network's true posterior, to judge others by.

A proposal follows the Hamiltonian H(w, v) = -log p(w) + |v|^2 / 2 for L leapfrog steps from a fresh momentum v ~
N(0, 1) and is accepted with probability min(1, exp(H - H')), which leaves p invariant whatever the step size. The step
size follows the acceptance rate during the warm-up only. Neal 2011 (arXiv 1206.1901).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

__all__ = ["Chains", "LogDensity", "hmc", "leapfrog", "split_r_hat"]

LogDensity = Callable[[Tensor], Tensor]
"""From C chains (C, P) to their log densities (C,), up to a constant."""


@dataclass(frozen=True)
class Chains:
    """Draws after the warm-up, (S, C, P), and how the sampler fared."""

    draws: Tensor
    acceptance: float
    step_size: float


def hmc(
    log_density: LogDensity,
    start: Tensor,
    *,
    num_samples: int,
    num_warmup: int,
    num_steps: int,
    step_size: float = 0.01,
    target_acceptance: float = 0.8,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Chains:
    """Run C chains side by side.

    Args:
        log_density: of the weights, up to a constant.
        start: where the chains begin, (C, P).
        num_samples: draws of each chain that are kept.
        num_warmup: proposals of each chain before these.
        num_steps: leapfrog steps of a proposal.
        step_size: of a leapfrog step when the warm-up begins.
        target_acceptance: share of accepted proposals that the warm-up aims at.
        generator: of all random numbers.
        progress: show a progress bar.

    Returns:
        The draws, and the sampler's acceptance and step size.
    """
    position, kept, rates = start.detach(), [], []
    value, slope = _value_and_slope(log_density, position)
    for index in tqdm(range(num_warmup + num_samples), "HMC", disable=not progress, leave=False):
        jitter = 0.8 + 0.4 * float(torch.rand((), generator=generator))  # no trajectory closes on itself
        momentum = torch.randn(position.shape, generator=generator, dtype=position.dtype)
        new, new_value, new_slope, end = leapfrog(log_density, position, slope, momentum, step_size * jitter, num_steps)
        gain = new_value - value - 0.5 * (end.square().sum(1) - momentum.square().sum(1))
        probability = gain.clamp_max(0).exp().nan_to_num(0.0)  # a diverged trajectory is refused
        accepted = torch.rand(len(position), generator=generator, dtype=position.dtype) < probability
        position = torch.where(accepted[:, None], new, position)
        value, slope = torch.where(accepted, new_value, value), torch.where(accepted[:, None], new_slope, slope)
        if index < num_warmup:  # Robbins & Monro: steps that fall as 1 / sqrt(n)
            step_size *= float(torch.exp((probability.mean() - target_acceptance) / (1 + index / 10) ** 0.5))
        else:
            kept.append(position)
            rates.append(probability.mean())
    return Chains(torch.stack(kept), float(torch.stack(rates).mean()), step_size)


def leapfrog(
    log_density: LogDensity, position: Tensor, slope: Tensor, momentum: Tensor, step: float, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A trajectory: reversible and volume-preserving, so with the momentum negated it leads back.

    Args:
        log_density: as of `hmc`.
        position: where it starts, (C, P).
        slope: gradient of the log density there, (C, P).
        momentum: at the start, (C, P).
        step: size of a step.
        num_steps: how many.

    Returns:
        Position, log density and its gradient there, and momentum at the end.
    """
    momentum, value = momentum + 0.5 * step * slope, slope
    for index in range(num_steps):
        position = position + step * momentum
        value, slope = _value_and_slope(log_density, position)
        momentum = momentum + (step if index < num_steps - 1 else 0.5 * step) * slope
    return position, value, slope, momentum


def _value_and_slope(log_density: LogDensity, position: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        value = log_density(position)
        (slope,) = torch.autograd.grad(value.sum(), position)
    return value.detach(), slope


def split_r_hat(values: Tensor) -> Tensor:
    """Gelman & Rubin's ratio of total to within-chain standard deviation, chains halved.

    Args:
        values: what C chains say in S draws, (S, C, ...).

    Returns:
        1 where all halves agree, (...); above about 1.05 the chains have not mixed.
    """
    half = len(values) // 2
    halves = torch.cat([values[:half], values[half : 2 * half]], dim=1)
    within = halves.var(0).mean(0)
    between = halves.mean(0).var(0)
    return (((half - 1) / half * within + between) / within).sqrt()
