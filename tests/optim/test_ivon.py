"""IVON: one step against NumPy, the exact posterior of a quadratic loss, accumulation, and a training that goes on."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bayeformers.optim import IVON

Array = NDArray[np.float64]


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def given_noise(optimizer: IVON, noises: Iterator[list[Tensor]]) -> None:
    """Draws take their noise from ``noises``, one list per draw."""
    members = [p for group in optimizer.param_groups for p in group["params"]]

    def drawn(kind: str, number: int) -> dict[nn.Parameter, Tensor]:
        for parameter in members:
            optimizer._state_of(parameter)
        return {p: e.clone() for p, e in zip(members, next(noises), strict=True)}

    optimizer._drawn_noise = drawn  # type: ignore[method-assign]


def loss_of(parameters: list[nn.Parameter], data: Tensor) -> Tensor:
    """A loss that is neither quadratic nor separable, the mean over rows of the data."""
    value = torch.cat([p.flatten() for p in parameters]).to(data.dtype)
    return (torch.tanh(data @ value) + 0.1 * (data @ value).square()).mean()


class Transcription:
    """Algorithm 1 of Shen et al. 2024 in NumPy, in the paper's names and order of lines."""

    def __init__(self, m: Array, h0: float, delta: float, lam: float, beta1: float, beta2: float, lr: float) -> None:
        self.m, self.h, self.g = m.copy(), np.full_like(m, h0), np.zeros_like(m)
        self.delta, self.lam, self.beta1, self.beta2 = delta, lam, beta1, beta2
        self.alpha, self.t = (h0 + delta) * lr, 0
        self.sigma = 1 / np.sqrt(lam * (self.h + delta))

    def step(self, gradients: list[Array], thetas: list[Array]) -> None:
        self.t += 1
        g_hat = sum(gradients) / len(gradients)
        pairs = zip(gradients, thetas, strict=True)
        h_hat = sum(g * (theta - self.m) / self.sigma**2 for g, theta in pairs) / len(gradients)
        self.g = self.beta1 * self.g + (1 - self.beta1) * g_hat
        correction = 0.5 * (1 - self.beta2) ** 2 * (self.h - h_hat) ** 2 / (self.h + self.delta)
        self.h = self.beta2 * self.h + (1 - self.beta2) * h_hat + correction
        g_bar = self.g / (1 - self.beta1**self.t)
        self.m = self.m - self.alpha * (g_bar + self.delta * self.m) / (self.h + self.delta)
        self.sigma = 1 / np.sqrt(self.lam * (self.h + self.delta))


def flat(tensors: list[Any]) -> Array:
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


@pytest.mark.parametrize("samples", [1, 3])
def test_steps_are_those_of_algorithm_1(samples: int) -> None:
    parameters, data = weights((3, 2), (4,)), torch.randn(5, 10, dtype=torch.float64, generator=seeded(1))
    options = {"ess": 50.0, "hess_init": 0.7, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.05}
    optimizer = IVON(parameters, lr=0.3, mc_samples=samples, **options)  # type: ignore[arg-type]
    expected = Transcription(flat(parameters), 0.7, 0.05, 50.0, 0.8, 0.9, 0.3)
    for _ in range(4):
        gradients, thetas = [], []
        for _ in range(samples):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                loss_of(parameters, data).backward()
                gradients.append(flat([p.grad for p in parameters]))
                thetas.append(flat(parameters))
        np.testing.assert_array_equal(flat(parameters), expected.m)
        optimizer.step()
        expected.step(gradients, thetas)
        # the two orders of operations differ in rounding alone
        np.testing.assert_allclose(flat(parameters), expected.m, rtol=1e-12)
        np.testing.assert_allclose(flat([optimizer.state[p]["hessian"] for p in parameters]), expected.h, rtol=1e-11)
        np.testing.assert_allclose(flat(list(optimizer.scales().values())), expected.sigma, rtol=1e-11)
        expected.m = flat(parameters)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_rescaling_and_with_clipped_coordinates() -> None:
    (weight,) = weights((4,))
    start, gradient = weight.detach().clone(), torch.tensor([5.0, -0.01, 0.2, -7.0], dtype=torch.float64)
    optimizer = IVON([weight], lr=0.5, ess=10, hess_init=2.0, weight_decay=0, rescale_lr=False, clip_radius=0.1)
    given_noise(optimizer, itertools.repeat([torch.zeros(4, dtype=torch.float64)]))
    with optimizer.sampled_params():
        (weight * gradient).sum().backward()
    optimizer.step()
    hessian = optimizer.state[weight]["hessian"]  # h_hat is 0 without noise
    torch.testing.assert_close(weight.detach(), start - 0.5 * (gradient / hessian).clamp(-0.1, 0.1))


# -- the posterior of a quadratic loss ---------------------------------------------------------------------------------


def test_fixed_point_of_a_quadratic_loss_is_the_exact_posterior() -> None:
    """N(m, S) with m = (A + delta)^-1 A b; of all factorised Gaussians the best has precision lambda (A_ii + delta).

    With A diagonal that is the exact posterior. Noise that is -1 or 1 in every combination has all the moments that
    the expectations of a quadratic loss need, so that these are exact and the fixed point has no error but rounding.
    """
    for coupling in (0.0, 0.3):
        a = torch.tensor([[0.5, coupling], [coupling, 3.0]], dtype=torch.float64)
        target, lam, delta = torch.tensor([1.0, -2.0], dtype=torch.float64), 40.0, 0.2
        (weight,) = weights((2,))
        signs = [[torch.tensor(s, dtype=torch.float64)] for s in itertools.product((-1.0, 1.0), repeat=2)]
        options = {"beta1": 0.3, "beta2": 0.5, "weight_decay": delta, "rescale_lr": False}
        optimizer = IVON([weight], lr=0.5, ess=lam, mc_samples=4, **options)  # type: ignore[arg-type]
        given_noise(optimizer, itertools.cycle(signs))
        for _ in range(100):  # h nears its fixed point by beta_2, the mean by about 1 - lr in each step
            for _ in range(4):
                with optimizer.sampled_params():
                    optimizer.zero_grad()
                    (0.5 * (weight - target) @ a @ (weight - target)).backward()
            optimizer.step()
        exact = torch.linalg.solve(a + delta * torch.eye(2, dtype=torch.float64), a @ target)
        torch.testing.assert_close(weight.detach(), exact, rtol=0, atol=1e-9)
        variance = optimizer.scales()[weight].square()
        torch.testing.assert_close(variance, 1 / (lam * (a.diagonal() + delta)), rtol=1e-10, atol=0)


def test_gaussian_noise_finds_the_variance_up_to_the_bias_of_its_average() -> None:
    """With target 0 the estimate h_hat = a eps^2 has variance v = 2 a^2 at the optimum.

    To first order in b = 1 - beta_2, line 5 is stationary at E h = a + b v / (2 (a + delta)), and h fluctuates by
    b v / 2 in variance: over n independent coordinates its mean by sqrt(b v / (2 n)). Terms of b^2, and the means'
    own wandering (their gradients add to v by a share of lr), are covered by twice the bias.
    """
    a, delta, beta2, n = 2.0, 0.1, 0.98, 4_000
    weight = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = IVON([weight], lr=0.01, ess=100, hess_init=a, weight_decay=delta, beta2=beta2, seed=3)
    for _ in range(250):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            (0.5 * a * weight.square()).sum().backward()
        optimizer.step()
    b, v = 1 - beta2, 2 * a**2
    bias, spread = b * v / (2 * (a + delta)), math.sqrt(b * v / (2 * n))
    error = float(optimizer.state[weight]["hessian"].mean()) - a
    assert abs(error - bias) < bias + 5 * spread


# -- accumulation ------------------------------------------------------------------------------------------------------


def stepped(batches: list[Tensor], draws: str, samples: int = 1) -> list[Tensor]:
    """Parameters and Hessians after three steps on micro-batches of one size."""
    parameters = weights((3, 2), (4,))
    optimizer = IVON(parameters, lr=0.3, ess=50, hess_init=0.7, beta2=0.9, mc_samples=samples)
    if draws == "equal":  # each micro-batch enters the same draw anew
        number = iter(range(10**6))
        own, count = optimizer._drawn_noise, len(batches)
        optimizer._drawn_noise = lambda kind, _: own(kind, next(number) // count)  # type: ignore[method-assign]
    for _ in range(3):
        if draws == "one":
            with optimizer.sampled_params():
                for batch in batches:
                    (loss_of(parameters, batch) / len(batches)).backward()
        else:
            for batch in batches:
                for _ in range(samples):
                    with optimizer.sampled_params():
                        (loss_of(parameters, batch) / len(batches)).backward()
        optimizer.step()
    return [*parameters, *(optimizer.state[p]["hessian"] for p in parameters)]


@pytest.mark.parametrize("draws", ["one", "equal"])
def test_micro_batches_are_one_big_batch(draws: str) -> None:
    data = torch.randn(8, 10, dtype=torch.float64, generator=seeded(2))
    for found, expected in zip(stepped(list(data.split(2)), draws), stepped([data], "one"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_micro_batches_with_draws_of_their_own_are_summed() -> None:
    """Two micro-batches, two draws each: g = sum over batches of the mean over draws, and so the product with eps."""
    parameters, data = weights((10,)), torch.randn(4, 10, dtype=torch.float64, generator=seeded(4))
    optimizer = IVON(parameters, lr=0.3, ess=50, hess_init=0.7, beta2=0.9, mc_samples=2)
    reference = Transcription(flat(parameters), 0.7, 1e-4, 50.0, 0.9, 0.9, 0.3)
    g_hat, product = np.zeros(10), np.zeros(10)
    for batch in data.split(2):
        for _ in range(2):
            with optimizer.sampled_params():
                (loss_of(parameters, batch) / 2).backward()
                g = flat([parameters[0].grad]) / 2
                g_hat, product = g_hat + g, product + g * (flat(parameters) - reference.m)
    assert parameters[0].grad is not None
    np.testing.assert_allclose(flat([parameters[0].grad]), g_hat, rtol=1e-12)
    optimizer.step()
    h_hat = product / reference.sigma**2
    expected = 0.9 * 0.7 + 0.1 * h_hat + 0.5 * 0.01 * (0.7 - h_hat) ** 2 / (0.7 + 1e-4)
    np.testing.assert_allclose(flat([optimizer.state[parameters[0]]["hessian"]]), expected, rtol=1e-10)


def test_gradients_of_a_draw_are_kept_whatever_becomes_of_their_memory() -> None:
    """`DistributedDataParallel(gradient_as_bucket_view=True)` writes the next gradients over them."""
    (parameter,) = weights((3,))
    optimizer = IVON([parameter], ess=50)
    with optimizer.sampled_params():
        parameter.sum().backward()
    memory = parameter.grad
    assert memory is not None
    with optimizer.sampled_params():
        memory.zero_()
        (2 * parameter).sum().backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [3.0, 3.0, 3.0]


def test_clipping_leaves_the_hessian_alone() -> None:
    data = torch.randn(4, 10, dtype=torch.float64, generator=seeded(4))
    found = []
    for limit in (math.inf, 1e-3):
        parameters = weights((10,))
        optimizer = IVON(parameters, ess=50, beta2=0.9)
        with optimizer.sampled_params():
            loss_of(parameters, data).backward()
        nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        found.append((optimizer.state[parameters[0]]["hessian"], optimizer.state[parameters[0]]["momentum"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    assert float(found[1][1].norm()) == pytest.approx(1e-4, rel=1e-3)  # (1 - beta_1) of the clipped norm


# -- which parameters, in which precision ------------------------------------------------------------------------------


def trained(optimizer: IVON, parameters: list[nn.Parameter], data: Tensor, steps: int = 5) -> None:
    for _ in range(steps):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss_of(parameters, data).backward()
        optimizer.step()


def test_frozen_and_unused_parameters_stay() -> None:
    parameters = weights((10,), (2,), (3,))
    parameters[2].requires_grad_(False)
    before = [p.detach().clone() for p in parameters]
    optimizer = IVON(parameters, ess=50)
    trained(optimizer, parameters[:1], torch.randn(4, 10, dtype=torch.float64, generator=seeded(4)))
    assert not torch.equal(parameters[0], before[0])
    assert torch.equal(parameters[1], before[1]) and torch.equal(parameters[2], before[2])
    assert set(optimizer.scales()) == set(parameters[:2])
    assert optimizer.state[parameters[1]]["step"] == 0 and optimizer.state[parameters[0]]["step"] == 5


def test_groups_have_their_own_options() -> None:
    """Two groups are two optimizers with the same noise."""
    data = torch.randn(4, 10, dtype=torch.float64, generator=seeded(4))
    first, second = weights((5,), (5,)), {"lr": 0.01, "ess": 500, "hess_init": 3.0, "beta1": 0.5, "weight_decay": 0.3}
    together = weights((5,), (5,))
    optimizer = IVON([{"params": together[:1]}, {"params": together[1:], **second}], ess=50, beta2=0.9)
    alone = [IVON(first[:1], ess=50, beta2=0.9), IVON(first[1:], beta2=0.9, **second)]
    noises = [list(optimizer._drawn_noise("training", number).values()) for number in range(3)]
    given_noise(alone[0], iter([[first] for first, _ in noises]))
    given_noise(alone[1], iter([[second] for _, second in noises]))
    for _ in range(3):
        with optimizer.sampled_params():
            optimizer.zero_grad()
            loss_of(together, data).backward()
        with alone[0].sampled_params(), alone[1].sampled_params():
            alone[0].zero_grad(), alone[1].zero_grad()
            loss_of(first, data).backward()
        for each in (optimizer, *alone):
            each.step()
    for found, expected in zip(together, first, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.protects("memory")
def test_parameters_in_16_bits_have_a_state_in_float32() -> None:
    """Steps far below the spacing of bfloat16 add up in the mean that is kept: as float32 parameters do.

    Gradients are rounded to 8 bits, relative errors 2^-9 that average out; 2 % is far above that.
    """
    data = torch.randn(16, 10, generator=seeded(4))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.ones(10)
        parameter = nn.Parameter(start.to(dtype, copy=True))
        optimizer = IVON([parameter], lr=1e-3, ess=1e6, hess_init=1.0, beta2=0.99, weight_decay=0)
        for _ in range(30):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                (data @ parameter.float()).square().mean().backward()
            optimizer.step()
        state = optimizer.state[parameter]
        assert all(state[name].dtype == torch.float32 for name in ("momentum", "hessian"))
        found[dtype] = state.get("mean", parameter.detach()) - start
        assert torch.equal(parameter, state.get("mean", parameter).to(dtype))
    assert float((found[torch.bfloat16] - found[torch.float32]).norm()) < 0.02 * float(found[torch.float32].norm())


def test_loaded_weights_replace_the_mean_of_16_bits() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = IVON([parameter], ess=10)
    with optimizer.sampled_params():
        parameter.sum().backward()
    optimizer.step()
    with torch.no_grad():
        parameter.fill_(5.0)
    with optimizer.sampled_params():
        pass
    assert torch.equal(parameter, torch.full_like(parameter, 5.0))


def test_large_and_strided_parameters_are_worked_on_in_parts() -> None:
    """A parameter of several parts, and one whose memory is not contiguous, do as small ones."""
    whole = torch.randn(300, 500, dtype=torch.float64, generator=seeded(5))
    found = []
    for shape in ("rows", "whole", "strided"):
        parts = [nn.Parameter(row.clone()) for row in whole] if shape == "rows" else [nn.Parameter(whole.clone())]
        if shape == "strided":
            parts = [nn.Parameter(whole.t().contiguous().t())]
        optimizer = IVON(parts, ess=50, beta2=0.9)
        for _ in range(2):
            with optimizer.sampled_params():
                optimizer.zero_grad()
                torch.cat([p.flatten() for p in parts]).sin().sum().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in parts]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_training_goes_on_bit_by_bit(dtype: torch.dtype, way: str, tmp_path: Any) -> None:
    data = torch.randn(4, 10, dtype=torch.float64, generator=seeded(4))
    parameters = weights((6,), (4,), dtype=dtype)
    optimizer = IVON(parameters, ess=50, beta2=0.9, seed=7)
    trained(optimizer, parameters, data, 3)
    if way == "deepcopy":
        again, other = copy.deepcopy((parameters, optimizer))
    else:
        again = [nn.Parameter(p.detach().clone()) for p in parameters]
        other = IVON(again, ess=50, beta2=0.9)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    with optimizer.sampled_params(train=False):  # a prediction takes nothing from the noise of training
        pass
    trained(optimizer, parameters, data, 3)
    trained(other, again, data, 3)
    for one, two in zip(parameters, again, strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][name]) if isinstance(value, Tensor) else value == 6


def test_an_exception_in_a_draw_brings_the_mean_back() -> None:
    (parameter,) = weights((4,))
    before, optimizer = parameter.detach().clone(), IVON([parameter], ess=50)

    def interrupted() -> None:
        with optimizer.sampled_params():
            assert not torch.equal(parameter, before)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(parameter, before)
    optimizer.step()  # of no draw
    assert torch.equal(parameter, before)


def test_a_prediction_leaves_gradients_alone() -> None:
    (parameter,) = weights((4,))
    optimizer = IVON([parameter], ess=50)
    with optimizer.sampled_params():
        parameter.sum().backward()
    gradient = parameter.grad
    with optimizer.sampled_params(train=False):
        assert parameter.grad is gradient
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_zero_grad_outside_of_a_draw_forgets_it() -> None:
    (parameter,) = weights((4,))
    optimizer, before = IVON([parameter], ess=50), parameter.detach().clone()
    with optimizer.sampled_params():
        parameter.sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(parameter, before)


def test_closure_runs_under_every_draw() -> None:
    data, losses = torch.randn(4, 10, dtype=torch.float64, generator=seeded(4)), list[float]()
    found = []
    for by_closure in (True, False):
        parameters = weights((10,))
        optimizer = IVON(parameters, ess=50, mc_samples=2)

        def closure(optimizer: IVON = optimizer, parameters: list[nn.Parameter] = parameters) -> float:
            optimizer.zero_grad()
            loss = loss_of(parameters, data)
            loss.backward()
            losses.append(loss.item())
            return losses[-1]

        if by_closure:
            assert optimizer.step(closure) == pytest.approx(sum(losses) / 2)
        else:
            for _ in range(2):
                with optimizer.sampled_params():
                    closure()
            optimizer.step()
        found.append(parameters[0])
    assert torch.equal(found[0], found[1])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0), ("lr", math.nan), ("lr", "0.1"), ("ess", 0), ("ess", -5.0), ("ess", math.inf), ("hess_init", 0.0),
        ("hess_init", -1.0), ("hess_init", None), ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", 2.0),
        ("weight_decay", -1e-4), ("weight_decay", math.nan), ("mc_samples", 0), ("mc_samples", 1.5),
        ("rescale_lr", 1), ("clip_radius", 0.0), ("clip_radius", math.nan), ("seed", -1), ("seed", 0.5),
    ],
)  # fmt: skip
def test_bad_options(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        IVON(weights((2,)), **{"ess": 10, name: value})
    if name not in ("mc_samples", "seed"):
        optimizer = IVON(weights((2,)), ess=10)
        with pytest.raises(ValueError, match=f"`{name}`"):
            optimizer.add_param_group({"params": weights((3,)), name: value})
        assert len(optimizer.param_groups) == 1


def test_bad_parameters() -> None:
    for bad in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="floating-point"):
            IVON([nn.Parameter(bad, requires_grad=False)], ess=10)


def test_bad_uses() -> None:
    (parameter,) = weights((2,))
    optimizer = IVON([parameter])
    with pytest.raises(ValueError, match="`ess`"), optimizer.sampled_params():
        pass
    optimizer = IVON([parameter], ess=10, mc_samples=2)
    with pytest.raises(TypeError, match="`train`"), optimizer.sampled_params(train=1):  # type: ignore[arg-type]
        pass
    parameter.sum().backward()
    with pytest.raises(RuntimeError, match="no draw"):
        optimizer.step()
    with optimizer.sampled_params():
        parameter.sum().backward()
        for use in (optimizer.step, optimizer.state_dict, lambda: copy.deepcopy(optimizer), optimizer.enter_draw):
            with pytest.raises(RuntimeError, match="inside of a draw"):
                use()
        with pytest.raises(RuntimeError, match="inside of a draw"):
            optimizer.add_param_group({"params": weights((3,))})
    with pytest.raises(RuntimeError, match="multiple of `mc_samples`"):
        optimizer.step()


def test_bad_states() -> None:
    (parameter,) = weights((2,))
    optimizer = IVON([parameter], ess=10)
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW([parameter]).state_dict())
    newer = optimizer.state_dict()
    newer["noise"]["version"] = 99
    with pytest.raises(ValueError, match="version"):
        optimizer.load_state_dict(newer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(IVON([{"params": weights((2,))}, {"params": weights((3,))}], ess=10).state_dict())


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer, before = IVON(table.parameters(), ess=10), table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"), optimizer.sampled_params():
        table(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(table.weight, before)
