"""SGHMC and Langevin dynamics on a quadratic: the stationary moments of the discrete chain, in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bayeformers.optim import SGHMC

CHAINS, DATA, CURVATURE, CENTRE = 40_000, 50, 2.0, 0.7


def run(steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The last weights and velocities of independent chains, each an element, whose mean loss is a (w - c)^2 / 2."""
    weight = torch.nn.Parameter(torch.zeros(CHAINS, dtype=torch.float64))
    optimizer = SGHMC([weight], num_data=DATA, **options)
    for _ in range(steps):
        weight.grad = CURVATURE * (weight.detach() - CENTRE)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]["momentum_buffer"]


def stationary(lr: float, momentum: float, temperature: float, prior_precision: float) -> Tensor:
    """S = A S A^T + Q of (w, v), by the Kronecker product: vec S = (I - A x A)^-1 vec Q."""
    a = CURVATURE + prior_precision / DATA
    step = torch.tensor([[1 - lr * a, momentum], [-lr * a, momentum]], dtype=torch.float64)
    noise = 2 * (1 - momentum) * lr * temperature / DATA * torch.ones(4, dtype=torch.float64)
    return torch.linalg.solve(torch.eye(4, dtype=torch.float64) - torch.kron(step, step), noise).reshape(2, 2)


@pytest.mark.parametrize(
    ("lr", "momentum", "temperature", "prior_precision"),
    [(0.3, 0.0, 1.0, 0.0), (0.3, 0.0, 0.25, 40.0), (0.1, 0.6, 1.0, 0.0), (0.2, 0.8, 2.0, 25.0)],
)
def test_stationary_moments(lr: float, momentum: float, temperature: float, prior_precision: float) -> None:
    # A's eigenvalues are at most 0.8^1/2 in modulus: after 100 steps the start is forgotten to 1.5e-5
    found, velocity = run(100, lr=lr, momentum=momentum, temperature=temperature, prior_precision=prior_precision)
    expected = stationary(lr, momentum, temperature, prior_precision)
    samples = torch.stack([found, velocity])
    a = CURVATURE + prior_precision / DATA
    mean = torch.tensor([CURVATURE * CENTRE / a, 0.0], dtype=torch.float64)
    std = expected.diagonal().sqrt()
    # of n independent chains the mean has standard error s / n^1/2, a covariance (s_ii s_jj + s_ij^2)^1/2 / n^1/2
    assert bool(((samples.mean(1) - mean).abs() < 5 * std / CHAINS**0.5).all())
    error = (torch.outer(std, std).square() + expected.square()).sqrt() / CHAINS**0.5
    assert bool(((samples.cov() - expected).abs() < 5 * error).all())


def test_langevin_is_the_closed_form() -> None:
    """T / (N a (1 - lr a / 2)): a third above the posterior's variance at this rate: the test above tells."""
    expected = stationary(0.25, 0.0, 1.0, 0.0)[0, 0]
    torch.testing.assert_close(expected.item(), 1 / (DATA * CURVATURE * (1 - 0.25 * CURVATURE / 2)))
    for lr in (1e-3, 1e-5):  # and the posterior's 1 / (N a) as the rate goes to 0, with momentum too
        for momentum in (0.0, 0.9):
            limit = stationary(lr, momentum, 1.0, 0.0)[0, 0].item()
            assert limit == pytest.approx(1 / (DATA * CURVATURE), rel=2 * lr * CURVATURE)


def steps(seed: int, number: int, resumed_at: int | None = None, global_seed: int = 0) -> list[Tensor]:
    torch.manual_seed(global_seed)
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))]
    made = {"lr": 0.1, "num_data": 10, "prior_precision": 2.0, "prior_mean": "start", "seed": seed}
    optimizer = SGHMC(parameters, **made)
    for step in range(number):
        if step == resumed_at:
            state = optimizer.state_dict()
            optimizer = SGHMC(parameters, **made)
            optimizer.load_state_dict(state)
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_noise_is_a_function_of_seed_step_and_place() -> None:
    one, other = steps(0, 5), steps(0, 5, resumed_at=3, global_seed=7)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], steps(1, 5)[0])
    assert not torch.equal(steps(0, 1)[0].diff(), steps(0, 1)[1].diff())


def test_closure_and_missing_gradients() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SGHMC([used, unused], lr=0.1, num_data=10)

    def closure() -> float:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0}, "`lr` must be a finite number > 0"),
        ({"lr": float("nan")}, "`lr`"),
        ({"num_data": 0}, "`num_data` must be a whole number >= 1"),
        ({"num_data": 1.5}, "`num_data`"),
        ({"momentum": 1.0}, "`momentum` must be below 1"),
        ({"momentum": -0.1}, "`momentum`"),
        ({"temperature": -1}, "`temperature`"),
        ({"prior_precision": -1}, "`prior_precision`"),
        ({"prior_mean": "pretrained"}, "`prior_mean` must be one of"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGHMC([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, "num_data": 10, **wrong})


def test_low_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="`params` must be float32 or float64"):
        SGHMC([torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))], lr=0.1, num_data=10)
