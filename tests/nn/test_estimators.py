"""What each estimator promises, exactly: outputs are affine in the noise, so basis noise gives their covariance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import bayesian_config, fixed_draw, predict, to_bayesian
from bayeformers.nn.estimators import ESTIMATORS, Layout
from bayeformers.nn.noise import Draw
from tests.nn.given_noise import GivenNoise, output
from tests.reference import sigma, sigma_slope

B, T, IN, OUT = 3, 4, 2, 3


def layer_of(kind: str, estimator: str) -> tuple[Any, Tensor]:
    """A float64 layer and its input, whose examples have several positions."""
    torch.manual_seed(0)
    x = torch.randn(B, T, IN, dtype=torch.float64)
    if kind == "linear":
        return bnn.Linear(IN, OUT, dtype=torch.float64, delta=0.3, estimator=estimator), x
    if kind == "conv1d":
        return bnn.Conv1D(OUT, IN, delta=0.3, estimator=estimator).double(), x
    table = bnn.Embedding(5, OUT, padding_idx=0, dtype=torch.float64, delta=0.3, estimator=estimator)
    return table, torch.tensor([[1, 2, 1, 0], [2, 2, 3, 4], [4, 1, 0, 3]])


def noise_basis(layer: Any) -> list[dict[str, Tensor]]:
    """Every unit vector of the layer's noise."""
    shapes = {name: layer.get_parameter(name).shape for name in layer.specs}
    basis = []
    for name, shape in shapes.items():
        for index in itertools.product(*map(range, shape)):
            if layer.specs[name].padding_idx == index[0]:
                continue
            noise = {other: torch.zeros(size, dtype=torch.float64) for other, size in shapes.items()}
            noise[name][index] = 1
            basis.append(noise)
    return basis


@torch.no_grad()
def covariance(layer: Any, x: Tensor, signs: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance (n, n) of all outputs together, given the signs."""
    zero = {name: torch.zeros(layer.get_parameter(name).shape, dtype=torch.float64) for name in layer.specs}
    mean = output(layer, x, GivenNoise(zero, signs))
    columns = [(output(layer, x, GivenNoise(noise, signs)) - mean).flatten() for noise in noise_basis(layer)]
    jacobian = torch.stack(columns, dim=1)
    return mean, jacobian @ jacobian.mT


def weight_sampling(kind: str, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the torch layer under w = mu + sigma eps, from its Jacobian."""
    source = {"linear": F.linear, "conv1d": lambda a, w, b: a @ w + b, "embedding": lambda a, w: w[a]}[kind]
    means = [layer.get_parameter(name).detach() for name in layer.specs]
    jacobians = torch.autograd.functional.jacobian(lambda *w: source(x, *w), tuple(means))
    scales = [sigma(getattr(layer, f"{name}_rho")) for name in layer.specs]
    if kind == "embedding":
        scales[0][0] = 0
    mean = source(x, *means)
    flat = [(j * s).reshape(mean.numel(), -1) for j, s in zip(jacobians, scales, strict=True)]
    return mean, sum(j @ j.mT for j in flat)  # type: ignore[return-value]


def per_example(matrix: Tensor) -> Tensor:
    """The blocks (B, n, n) of single examples on the diagonal of a covariance of all outputs."""
    size = len(matrix) // B
    return torch.stack([matrix[b * size : (b + 1) * size, b * size : (b + 1) * size] for b in range(B)])


each_kind = pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])


@each_kind
def test_reparameterization_is_one_network_for_the_batch(kind: str) -> None:
    """Mean and covariance over positions and examples are those of one weight sample."""
    layer, x = layer_of(kind, "reparameterization")
    for found, expected in zip(covariance(layer, x), weight_sampling(kind, layer, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.protects("flipout_signs_per_example")
@each_kind
def test_flipout_signs_per_example(kind: str) -> None:
    """Whatever the signs: each example's mean and covariance over its positions are those of a weight sample."""
    layer, x = layer_of(kind, "flipout")
    expected_mean, expected = weight_sampling(kind, layer, x)
    mean, found = covariance(layer, x)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(per_example(found), per_example(expected), rtol=1e-6, atol=1e-12)
    assert not torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max())), "examples differ in signs"


def test_signs_per_position_would_fail() -> None:
    """The pooled output's variance with signs of their own at every position: too small by about the length."""
    layer, x = layer_of("linear", "flipout")
    _, expected = weight_sampling("linear", layer, x)
    flat = x.reshape(B * T, IN)  # every position an example: what signs per position amount to
    _, found = covariance(layer, flat)
    pool = torch.ones(T, dtype=torch.float64) / T
    variances = [torch.einsum("sctd,s,t->cd", m.reshape(T, OUT, T, OUT), pool, pool).diagonal() for m in (
        per_example(expected)[0], per_example(found)[0]
    )]  # fmt: skip
    assert variances[1].sum() < 0.9 * variances[0].sum()


def test_flipout_decorrelates_examples() -> None:
    """Over all sign patterns the covariance between two examples is zero: enumerated, not sampled."""
    torch.manual_seed(0)
    layer = bnn.Linear(2, 1, bias=True, dtype=torch.float64, delta=0.3, estimator="flipout")
    x = torch.randn(2, 2, dtype=torch.float64)
    total = torch.zeros(2, 2, dtype=torch.float64)
    patterns = list(itertools.product([-1.0, 1.0], repeat=6))
    for pattern in patterns:
        tables = {1: torch.tensor(pattern[:4]).view(2, 2), 0: torch.tensor(pattern[4:]).view(2, 1)}
        total += covariance(layer, x, lambda spec, axis, shape, device: tables[axis])[1]  # noqa: B023
    _, expected = weight_sampling("linear", layer, x)
    torch.testing.assert_close(total / len(patterns), torch.diag(expected.diagonal()), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_local_reparameterization_of_each_element(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise 0 gives the mean, noise 1 adds the standard deviation of weight sampling, element by element."""
    layer, x = layer_of(kind, "local_reparameterization")
    expected_mean, expected = weight_sampling(kind, layer, x)
    draw = GivenNoise({})
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    mean = output(layer, x, draw)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    variance = (output(layer, x, draw) - mean).square().flatten()
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected.diagonal(), rtol=1e-6, atol=1e-12)


@pytest.mark.protects("local_noise_per_position")
def test_local_noise_per_position() -> None:
    """Fresh noise at every output element: 4,000 outputs of equal inputs, correlation within 5 / sqrt(4000) of 0."""
    torch.manual_seed(1)
    layer = bnn.Linear(2, 2, delta=0.5, estimator="local_reparameterization").train()
    x = torch.ones(4000, 2, 2)
    with torch.no_grad():
        y = layer(x).reshape(4000, 4)
    variance = sigma(layer.weight_rho).square().sum(1) + sigma(layer.bias_rho).square()
    found = y.double().var(0)
    assert ((found / variance.repeat(2) - 1).abs() < 5 * math.sqrt(2 / 4000)).all()
    correlation = torch.corrcoef(y.T.double()) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("estimator", ["flipout", "local_reparameterization"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients(kind: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an NLL by means and rho, in float64, against a functional reference of the same noise."""
    layer, x = layer_of(kind, estimator)
    upstream = torch.randn(B, T, OUT, dtype=torch.float64)
    noise = {name: torch.randn_like(layer.get_parameter(name)) for name in layer.specs}
    at_output = torch.randn(B, T, OUT, dtype=torch.float64)
    signs = {a: torch.randint(2, (B, n)).double() * 2 - 1 for a, n in ((0, OUT), (1, IN))}
    if kind == "conv1d":
        signs = {0: signs[1], 1: signs[0]}
    layer.scope.running = GivenNoise(noise, lambda spec, axis, shape, device: signs[axis])
    monkeypatch.setattr(torch, "randn_like", lambda tensor: at_output)
    layer.train()(x).backward(upstream)
    monkeypatch.undo()
    means = {name: layer.get_parameter(name).detach().requires_grad_() for name in layer.specs}
    scales = {name: sigma(getattr(layer, f"{name}_rho")).requires_grad_() for name in layer.specs}
    source = F.linear if kind == "linear" else lambda a, w, b: a @ w + b
    mean = source(x, means["weight"], means["bias"])
    if estimator == "flipout":
        r, t = (signs[0], signs[1]) if kind == "conv1d" else (signs[1], signs[0])
        shift = source(x * r[:, None], scales["weight"] * noise["weight"], scales["bias"] * noise["bias"])
        y = mean + shift * t[:, None]
    else:
        y = mean + source(x**2, scales["weight"] ** 2, scales["bias"] ** 2).sqrt() * at_output
    y.backward(upstream)
    for name in layer.specs:
        torch.testing.assert_close(layer.get_parameter(name).grad, means[name].grad)
        rho = getattr(layer, f"{name}_rho")
        expected = (scales[name].grad * sigma_slope(rho)).float()  # type: ignore[operator]
        torch.testing.assert_close(rho.grad, expected, rtol=1e-5, atol=1e-6)


def test_tied_table_is_one_draw_per_example() -> None:
    """A lookup and a Linear that share a weight see, in each example, the same perturbed table."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.table(ids), self.head(x)

    model = to_bayesian(Tied().double(), delta=0.5, estimator="flipout").train()
    ids, x = torch.arange(5).repeat(2, 1), torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    with torch.no_grad():
        rows, logits = model(ids, x)
    torch.testing.assert_close(rows, logits.mT)
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_a_held_draw_is_one_network(estimator: str) -> None:
    """Prediction never depends on the estimator, in `train()` either."""
    layers = []
    for name in (estimator, "reparameterization"):
        torch.manual_seed(0)
        layers.append(bnn.Linear(4, 3, estimator=name).train())
    x = torch.randn(2, 5, 4)
    outputs = []
    for layer in layers:
        with fixed_draw(layer, 3, seed=1):
            outputs.append(layer(x))
    assert torch.equal(*outputs)
    probabilities = [predict(nn.Sequential(layer), x[:, 0], num_samples=4).log_probs for layer in layers]
    assert torch.equal(*probabilities)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(estimator: str, dtype: torch.dtype) -> None:
    """Zero input has a gradient, and large inputs whose squares overflow float16 a finite output."""
    layer = bnn.Linear(4, 3, dtype=dtype, estimator=estimator).train()
    for value in (0.0, 500.0):
        layer.zero_grad()
        y = layer(torch.full((2, 4), value, dtype=dtype))
        assert y.dtype == dtype and y.isfinite().all()
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.autocast("cpu", dtype=dtype):
        assert layer.float()(torch.full((2, 4), 500.0)).isfinite().all()


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_recomputation_finds_the_same_draw(estimator: str) -> None:
    """Gradients with activation checkpointing equal those without, bit for bit."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        to_bayesian(net, delta=0.3, freeze=False, estimator=estimator).train()
        x = torch.randn(3, 4)
        torch.manual_seed(5)
        if checkpointed:

            class Outer(nn.Module):
                def __init__(self, inner: nn.Module) -> None:
                    super().__init__()
                    self.inner = inner

                def forward(self, x: Tensor) -> Tensor:
                    return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

            Outer(net)(x).square().sum().backward()
        else:
            net(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_compiles_in_one_graph(estimator: str) -> None:
    layer = bnn.Linear(4, 3, estimator=estimator).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(torch.randn(2, 5, 4))
    y.sum().backward()
    assert y.shape == (2, 5, 3) and layer.weight_rho.grad is not None


@pytest.mark.protects("noise_is_fresh")
def test_noise_is_fresh() -> None:
    """Two forwards before one backward: each call's gradient has its own noise (a refilled buffer would not)."""
    for estimator in ESTIMATORS:
        torch.manual_seed(0)
        layer = bnn.Linear(4, 3, delta=0.5, estimator=estimator).train()
        x = torch.randn(2, 4)
        single = []
        torch.manual_seed(3)
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().sum().backward()
            single.append(layer.weight_rho.grad.clone())
        layer.zero_grad()
        torch.manual_seed(3)
        first, second = layer(x), layer(x)
        (first.square().sum() + second.square().sum()).backward()
        torch.testing.assert_close(layer.weight_rho.grad, single[0] + single[1])
        assert not torch.allclose(single[0], single[1])


# -- per layer ---------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))


def names(model: nn.Module) -> dict[str, str]:
    return {name: m.estimator.name for name, m in model.named_modules() if isinstance(m, bnn.BayesianModule)}


def test_estimator_by_pattern() -> None:
    """The first matching pattern decides, as suffix or full regular expression; the rest keeps reparameterization."""
    mapping = {"2.1": "local_reparameterization", r"2\..*": "flipout"}
    model = to_bayesian(net(), estimator=mapping)
    assert names(model) == {"0": "reparameterization", "2.0": "flipout", "2.1": "local_reparameterization"}
    assert bayesian_config(model).estimator == mapping


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ({"7": "flipout"}, "'7'.*matches no converted layer"),
        ({"0": "flipot"}, "`estimator`.*'flipot'"),
        ({}, "empty mapping"),
        ({"(": "flipout"}, "regular expression"),
        ({0: "flipout"}, "strings"),
        ({"0": None}, "`estimator`.*None"),
        (["flipout"], "`estimator`"),
    ],
)
def test_wrong_estimators(estimator: Any, message: str) -> None:
    model = net()
    with pytest.raises((TypeError, ValueError), match=message):
        to_bayesian(model, estimator=estimator)
    assert type(model[0]) is nn.Linear


def test_layout_of_signs() -> None:
    """Signs follow the axes of examples and features wherever they are."""
    layer = bnn.Linear(2, 2)
    layer.scope.running = Draw(0, keep=False)
    weight = layer.variational("weight")
    for shape, layout, expected in (
        ((5, 3, 2), Layout(), (5, 1, 2)),
        ((3, 5, 2), Layout(examples=1), (1, 5, 2)),
        ((5, 2, 4, 4), Layout(features=-3), (5, 2, 1, 1)),
    ):
        signs = layout.signs(weight, 1, torch.zeros(shape))
        assert signs.shape == expected and set(signs.flatten().tolist()) <= {-1.0, 1.0}
    seq_first = Layout(examples=1).signs(weight, 1, torch.zeros(3, 5, 2))
    assert torch.equal(seq_first[0], Layout().signs(weight, 1, torch.zeros(5, 3, 2))[:, 0])
    assert not Layout(features=-3).is_batched(torch.zeros(2, 4, 4))
