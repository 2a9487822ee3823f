"""`Bilinear`: torch's values at the mean, and the moments of each estimator, exact or from draws."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import bayeformers.nn as bnn
from bayeformers import NormalPrior, fixed_draw, kl_divergence, posterior_mean, to_bayesian, to_deterministic
from bayeformers.nn import training_draw
from tests.reference import noise_of, sigma, sigma_slope

ESTIMATORS = sorted(bnn.ESTIMATORS)
SHAPES = [(3,), (3, 2), (2, 2, 3)]


def converted(estimator: str = "reparameterization", bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.Bilinear(3, 4, 5, bias=bias, dtype=torch.float64)
    return to_bayesian(layer, 0.3, estimator=estimator, **options).train()


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, 3, dtype=torch.float64), torch.randn(*shape, 4, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), *SHAPES])
def test_torch_at_the_mean_and_of_a_draw(bias: bool, shape: tuple[int, ...]) -> None:
    layer = converted(bias=bias)
    rest = to_deterministic(copy.deepcopy(layer))
    x = inputs(*shape)
    with torch.no_grad():
        assert torch.equal(layer.eval()(*x), rest(*x))
        with posterior_mean(layer.train()):
            assert torch.equal(layer(*x), rest(*x))
        noise = noise_of(rest, {"": "Bilinear"}, 2, 1)
        weights = {n: layer.get_parameter(n) + sigma(layer.get_parameter(f"{n}_rho")) * eps for n, eps in noise.items()}
        with fixed_draw(layer, 2, seed=1):
            torch.testing.assert_close(layer(*x), functional_call(rest, weights, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_flipout_is_one_network_per_example(shape: tuple[int, ...]) -> None:
    """Example n sees W + (t_n x r_n x s_n) * sigma eps and b + t_n * sigma_b eps_b at all of its positions."""
    layer = converted("flipout")
    x1, x2 = inputs(*shape)
    with torch.no_grad(), training_draw(layer):
        output = layer(x1, x2)
        weight, bias = layer.variational("weight"), layer.variational("bias")
        signs = [
            weight.draw.signs(weight.spec, axis, (len(x1), size), x1.device).double()
            for axis, size in enumerate((5, 3, 4))
        ]
        for n in range(len(x1)):
            flips = torch.einsum("o,i,j->oij", *(sign[n] for sign in signs))
            own = weight.loc + flips * weight.perturbation
            expected = torch.einsum("...i,oij,...j->...o", x1[n], own, x2[n])
            expected = expected + bias.loc + signs[0][n] * bias.perturbation
            torch.testing.assert_close(output[n], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments(estimator: str) -> None:
    """Mean and covariance over 2,000 forwards, within 5 standard errors (sqrt(2 / S) relative for variances)."""
    draws = 2000
    layer = converted(estimator)
    x1, x2 = inputs(3)
    with torch.no_grad():
        outputs = torch.stack([layer(x1, x2).flatten() for _ in range(draws)])
        mean = nn.functional.bilinear(x1, x2, layer.weight, layer.bias).flatten()
    variance, variance_b = sigma(layer.weight_rho).square(), sigma(layer.bias_rho).square()
    between = torch.einsum("ni,nj,mi,mj,oij->nmo", x1, x2, x1, x2, variance) + variance_b
    covariance = torch.einsum("nmo,op->nomp", between, torch.eye(5, dtype=torch.float64)).reshape(15, 15)
    if estimator != "reparameterization":
        covariance = covariance * torch.block_diag(*[torch.ones(5, 5)] * 3)
    spread = covariance.diagonal().sqrt()
    assert ((outputs.mean(0) - mean).abs() < 5 * spread / math.sqrt(draws)).all()
    assert ((outputs.T.cov() - covariance).abs() < 5 * math.sqrt(2 / draws) * torch.outer(spread, spread)).all()


def test_gradients_of_nll_and_kl() -> None:
    layer = converted(freeze=False, prior=NormalPrior(0.5, 0.1))
    rest = to_deterministic(copy.deepcopy(layer))
    x = inputs(4)
    with fixed_draw(layer, 0):
        (layer(*x).tanh().sum() + 0.01 * kl_divergence(layer)).backward()
    noise = noise_of(rest, {"": "Bilinear"}, 0)
    means = {n: layer.get_parameter(n).detach().clone().requires_grad_() for n in noise}
    scales = {n: sigma(layer.get_parameter(f"{n}_rho")).requires_grad_() for n in noise}
    output = functional_call(rest, {n: means[n] + scales[n] * noise[n] for n in noise}, x)
    prior = torch.distributions.Normal(torch.tensor(0.1).double(), torch.tensor(0.5).double())
    divergence = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(means[n], scales[n]), prior).sum() for n in noise
    )
    (output.tanh().sum() + 0.01 * divergence).backward()
    for name in noise:
        torch.testing.assert_close(layer.get_parameter(name).grad, means[name].grad, rtol=1e-6, atol=1e-8)
        rho = layer.get_parameter(f"{name}_rho")
        slope = scales[name].grad * sigma_slope(rho)  # type: ignore[operator]
        torch.testing.assert_close(rho.grad, slope.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16_and_compile(estimator: str) -> None:
    torch._dynamo.reset()
    layer = converted(estimator).to(torch.bfloat16)
    x1, x2 = (x.bfloat16() for x in inputs(2))
    assert layer(x1, x2).dtype == torch.bfloat16 and layer.weight_rho.dtype == torch.float32
    layer = converted(estimator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(2)
    assert not torch.equal(compiled(*x), compiled(*x))
    compiled(*x).sum().backward()
    assert layer.weight_rho.grad.abs().sum() > 0


def test_built_by_hand_and_copied() -> None:
    torch.manual_seed(0)
    layer = bnn.Bilinear(3, 4, 5, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Bilinear(3, 4, 5, dtype=torch.float64)
    state = layer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert set(state) == {"weight", "bias", "weight_rho", "bias_rho"}
    x = inputs(2)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), bnn.Bilinear(3, 4, 5, dtype=torch.float64)):
        twin.load_state_dict(state)
        with torch.no_grad(), fixed_draw(layer, 0), fixed_draw(twin, 0):
            assert torch.equal(layer(*x), twin(*x))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="`estimator`"):
        bnn.Bilinear(3, 4, 5, estimator="exact")
    with pytest.raises(RuntimeError):
        converted()(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
