"""What each estimator promises of the six convolutions, exactly: outputs are affine in the noise; and the gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import bayeformers.nn as bnn
from bayeformers import NormalPrior, kl_divergence
from bayeformers.nn.estimators import ESTIMATORS
from tests.nn.given_noise import GivenNoise, output
from tests.reference import sigma, sigma_slope

B = 2  # examples
each_estimator = pytest.mark.parametrize("estimator", sorted(ESTIMATORS))

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "1d": ("Conv1d", {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}, (4, 7)),
    "1d depthwise": ("Conv1d", {"groups": 4, "padding": "same", "padding_mode": "circular"}, (4, 4)),
    "2d": ("Conv2d", {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "reflect", "groups": 2}, (4, 4, 3)),
    "2d strided": ("Conv2d", {"kernel_size": (1, 2), "stride": (2, 1), "padding": "valid", "bias": False}, (4, 4, 3)),
    "2d zeros": ("Conv2d", {"kernel_size": 2, "padding": 1, "groups": 2}, (4, 2, 3)),
    "3d": ("Conv3d", {"kernel_size": (2, 1, 2), "padding": 1, "padding_mode": "replicate", "groups": 2}, (4, 2, 2, 2)),
    "1d transposed": ("ConvTranspose1d", {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (4, 4)),
    "2d transposed": ("ConvTranspose2d", {"kernel_size": (2, 3), "dilation": (2, 1), "groups": 2}, (4, 2, 3)),
    "3d transposed": ("ConvTranspose3d", {"kernel_size": 2, "stride": (1, 2, 2), "bias": False}, (4, 1, 2, 2)),
}
each_case = pytest.mark.parametrize("case", CASES)


def layer_of(case: str, estimator: str = "reparameterization") -> tuple[Any, Tensor]:
    """A float64 layer with 4 channels on both sides, in `train()`, and its input."""
    torch.manual_seed(0)
    name, options, shape = CASES[case]
    options = {"kernel_size": 3, "dtype": torch.float64, "delta": 0.3, "estimator": estimator, **options}
    layer = getattr(bnn, name)(4, 4, prior=NormalPrior(0.7, 0.0), **options)
    return layer.train(), torch.randn(B, *shape, dtype=torch.float64)


def plain_copy(layer: Any) -> Any:
    """The torch layer with the same means."""
    other = copy.deepcopy(layer)
    other.become_deterministic()
    other.__class__ = layer.torch_class
    return other


def zero_noise(layer: Any) -> dict[str, Tensor]:
    return {name: torch.zeros(getattr(layer, name).shape, dtype=torch.float64) for name in layer.specs}


@torch.no_grad()
def moments(layer: Any, x: Tensor, signs: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all outputs together, given the signs: outputs are affine in the noise."""
    mean = output(layer, x, GivenNoise(zero_noise(layer), signs))
    columns = []
    for name in layer.specs:
        for index in itertools.product(*map(range, getattr(layer, name).shape)):
            noise = zero_noise(layer)
            noise[name][index] = 1
            columns.append((output(layer, x, GivenNoise(noise, signs)) - mean).flatten())
    jacobian = torch.stack(columns, dim=1)
    return mean, jacobian @ jacobian.mT


def weight_sampling(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the torch layer under w = mu + sigma eps, from autograd's Jacobian in the weights."""
    plain, means = plain_copy(layer), [getattr(layer, name).detach() for name in layer.specs]

    def outputs(*weights: Tensor) -> Tensor:
        result: Tensor = functional_call(plain, dict(zip(layer.specs, weights, strict=True)), x)
        return result

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(means))
    mean = outputs(*means)
    scales = [sigma(getattr(layer, f"{name}_rho")) for name in layer.specs]
    rows = torch.cat([(j * s).reshape(mean.numel(), -1) for j, s in zip(jacobians, scales, strict=True)], dim=1)
    return mean, rows @ rows.mT


def per_example(matrix: Tensor) -> Tensor:
    """The blocks (B, n, n) of single examples on the diagonal."""
    return torch.stack([rows.chunk(B, dim=1)[b] for b, rows in enumerate(matrix.chunk(B))])


@each_case
def test_reparameterization_is_one_network_for_the_batch(case: str) -> None:
    """Mean and covariance over positions and examples are those of one weight sample."""
    layer, x = layer_of(case)
    for found, expected in zip(moments(layer, x), weight_sampling(layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.protects("flipout_signs_per_example")
@each_case
def test_flipout_signs_per_example(case: str) -> None:
    """Whatever the signs: each image's mean and covariance over its positions are those of a weight sample."""
    layer, x = layer_of(case, "flipout")
    expected_mean, expected = weight_sampling(layer, x)
    mean, found = moments(layer, x)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(per_example(found), per_example(expected), rtol=1e-6, atol=1e-12)
    assert not torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max())), "images differ in signs"


@each_case
def test_flipout_of_one_image(case: str) -> None:
    """Without an axis of examples there is nothing to decorrelate: plain reparameterization."""
    layer, x = layer_of(case, "flipout")
    other, _ = layer_of(case)
    noise = {name: torch.randn_like(value) for name, value in zero_noise(layer).items()}
    assert torch.equal(output(layer, x[0], GivenNoise(noise)), output(other, x[0], GivenNoise(noise)))


@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d"])
def test_flipout_decorrelates_examples(name: str) -> None:
    """Over all sign patterns the covariance between two images is zero, with groups: enumerated, not sampled."""
    torch.manual_seed(0)
    layer = getattr(bnn, name)(2, 2, 2, groups=2, dtype=torch.float64, delta=0.3, estimator="flipout")
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    total: Any = 0.0
    patterns = list(itertools.product([-1.0, 1.0], repeat=8))
    for pattern in patterns:
        tables = torch.tensor(pattern, dtype=torch.float64).view(2, 2, 2)
        total = total + moments(layer, x, lambda spec, axis, shape, device: tables[axis])[1]  # noqa: B023
    _, expected = weight_sampling(layer, x)
    torch.testing.assert_close(total / len(patterns), torch.block_diag(*per_example(expected)), rtol=1e-6, atol=1e-12)


@each_case
def test_local_reparameterization_of_each_element(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise 0 gives the mean, noise 1 adds the standard deviation of weight sampling, element by element."""
    layer, x = layer_of(case, "local_reparameterization")
    expected_mean, expected = weight_sampling(layer, x)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    mean = output(layer, x, GivenNoise({}))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    variance = (output(layer, x, GivenNoise({})) - mean).square().flatten()
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected.diagonal(), rtol=1e-6, atol=1e-12)


@each_estimator
@each_case
def test_gradients(case: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NLL + KL / N by means and rho, in float64, against the torch layer with the same noise."""
    layer, x = layer_of(case, estimator)
    size = layer(x).shape
    target, at_output = torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    noise = {name: torch.randn_like(value) for name, value in zero_noise(layer).items()}
    tables = {axis: torch.randint(2, (B, 4)).double() * 2 - 1 for axis in (0, 1)}
    monkeypatch.setattr(torch, "randn_like", lambda tensor, **_: at_output)
    y = output(layer, x, GivenNoise(noise, lambda spec, axis, shape, device: tables[axis]))
    monkeypatch.undo()
    ((y - target).square().sum() + kl_divergence(layer) / 50).backward()

    means = {name: getattr(layer, name).detach().requires_grad_() for name in layer.specs}
    scales = {name: sigma(getattr(layer, f"{name}_rho")).requires_grad_() for name in layer.specs}
    plain = plain_copy(layer)

    def apply(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(plain, weights, x)
        return result

    if estimator == "reparameterization":
        expected = apply(x, {name: means[name] + scales[name] * noise[name] for name in means})
    elif estimator == "flipout":
        r, t = (tables[i].reshape(B, 4, *[1] * (x.dim() - 2)) for i in ((0, 1) if layer.transposed else (1, 0)))
        expected = apply(x, means) + t * apply(x * r, {name: scales[name] * noise[name] for name in means})
    else:
        variance = apply(x.square(), {name: scales[name].square() for name in means})
        expected = apply(x, means) + variance.sqrt() * at_output
    kl = sum((-(s / 0.7).log() + (s.square() + means[n].square()) / (2 * 0.49) - 0.5).sum() for n, s in scales.items())
    ((expected - target).square().sum() + kl / 50).backward()
    torch.testing.assert_close(y, expected)
    for name in layer.specs:
        torch.testing.assert_close(getattr(layer, name).grad, means[name].grad)
        rho, slope = getattr(layer, f"{name}_rho"), scales[name].grad
        assert slope is not None
        torch.testing.assert_close(rho.grad, (slope * sigma_slope(rho)).float(), rtol=1e-5, atol=1e-6)
