"""The six convolutions: torch's own at the mean, arguments, precision, compiling, conversion."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

import bayeformers.nn as bnn
from bayeformers import fixed_draw, posterior_mean, summary, to_bayesian, to_deterministic
from bayeformers.nn.estimators import ESTIMATORS
from tests.reference import dense_noise, key_of, sigma

NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
each_class = pytest.mark.parametrize("name", NAMES)
each_estimator = pytest.mark.parametrize("estimator", sorted(ESTIMATORS))


# ------------------------------------------------------------------------------------------------------ torch's layers


@st.composite
def arguments(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Constructor arguments that torch accepts, and the shape of an input, with or without its first axis."""
    axes, transposed = int(name[-2]), "Transpose" in name

    def sizes(low: int, high: int) -> Any:
        """One number or one for each axis."""
        one = st.integers(low, high)
        return draw(st.one_of(one, st.tuples(*[one] * axes)))

    def full(size: Any) -> tuple[int, ...]:
        return size if isinstance(size, tuple) else (size,) * axes

    groups = draw(st.sampled_from([1, 2, 3]))
    made = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": sizes(1, 3),
        "stride": sizes(1, 3),
        "dilation": sizes(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding": sizes(0, 2),
    }
    if transposed:
        top = min(max(pair) for pair in zip(full(made["stride"]), full(made["dilation"]), strict=True)) - 1
        made["output_padding"] = sizes(0, top)
    else:
        made["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        made["padding"] = draw(st.sampled_from([made["padding"], "same", "valid"]))
        if made["padding"] == "same":
            made["stride"] = 1
    reach = [(k - 1) * d + 1 for k, d in zip(full(made["kernel_size"]), full(made["dilation"]), strict=True)]
    shape = tuple(draw(st.integers(r, r + 2)) for r in reach)
    if transposed:
        shape = tuple(draw(st.integers(5, 6)) for _ in reach)  # as padding takes 4
    elif not isinstance(made["padding"], str):  # a reflection is shorter than what it reflects
        shape = tuple(max(n, p + 1) for n, p in zip(shape, full(made["padding"]), strict=True))
    batch = draw(st.sampled_from([(), (2,)]))
    return made, (*batch, made["in_channels"], *shape)


def drawn_weights(layer: Any, index: int, seed: int) -> dict[str, Tensor]:
    """mu + sigma eps with the reference's noise, in float64."""
    return {
        name: layer.get_parameter(name).detach()
        + sigma(getattr(layer, f"{name}_rho")) * dense_noise(key_of(seed, index, name), layer.get_parameter(name).shape)
        for name in layer.specs
    }


@pytest.mark.protects("groups")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@each_class
def test_like_torch(name: str) -> None:
    """200 random layers: bit for bit torch's at the mean, torch's at mu + sigma eps under a draw; one state dict."""

    @settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(name), st.sampled_from(sorted(ESTIMATORS)))
    def check(made: tuple[dict[str, Any], tuple[int, ...]], estimator: str) -> None:
        options, shape = made
        torch.manual_seed(0)
        layer = getattr(bnn, name)(**options, dtype=torch.float64, delta=0.2, estimator=estimator)
        torch.manual_seed(1)
        plain = getattr(nn, name)(**options, dtype=torch.float64)
        assert layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
        x = torch.randn(shape, dtype=torch.float64)
        expected = plain(x)
        assert torch.equal(layer.eval()(x), expected)
        with posterior_mean(layer.train()):
            assert torch.equal(layer(x), expected)
        random = layer(x)
        assert random.shape == expected.shape and not torch.equal(random, expected)
        with fixed_draw(layer, 1, seed=2):
            torch.testing.assert_close(
                layer(x), functional_call(plain, drawn_weights(layer, 1, 2), x), atol=1e-6, rtol=0
            )
        means = {key: value for key, value in layer.state_dict().items() if not key.endswith("_rho")}
        plain.load_state_dict(means)

    check()


@each_class
def test_same_initialisation(name: str) -> None:
    made = []
    for module in (bnn, nn):
        torch.manual_seed(3)
        made.append(getattr(module, name)(4, 6, 3, groups=2))
    assert all(torch.equal(made[0].state_dict()[key], value) for key, value in made[1].state_dict().items())
    assert repr(made[1])[:-1] in repr(made[0]) and "estimator='reparameterization'" in repr(made[0])


@pytest.mark.parametrize("name", NAMES[3:])
def test_output_size(name: str) -> None:
    """A draw honours it as the mean does, with or without the first two axes, and for one image too."""
    axes = int(name[-2])
    layer, plain = (getattr(module, name)(2, 3, 3, stride=3, dtype=torch.float64) for module in (bnn, nn))
    x = torch.randn(2, 2, *[3] * axes, dtype=torch.float64)
    for size in ([9] * axes, [10] * axes, [2, 3, *[11] * axes]):
        for mode in (True, False):
            assert layer.train(mode)(x, output_size=size).shape[2:] == (size[-1],) * axes
        assert layer.train()(x[0], size[-axes:]).shape[1:] == (size[-1],) * axes
        expected = functional_call(plain, drawn_weights(layer, 0, 0), (x, size))
        with fixed_draw(layer, 0):
            torch.testing.assert_close(layer(x, size), expected, atol=1e-6, rtol=0)
    for mode in (True, False):
        with pytest.raises(ValueError, match="valid sizes range from"):
            layer.train(mode)(x, [20] * axes)


@each_class
def test_wrong_arguments(name: str) -> None:
    kind, axes = getattr(bnn, name), int(name[-2])
    for options, message in (
        ({"groups": 3}, "divisible by groups"),
        ({"padding_mode": "mirror"}, "padding"),
        ({"estimator": "flipot"}, r"`estimator`.*'flipot'"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(2, 4, 3, **options)
    for estimator, mode in itertools.product(ESTIMATORS, (True, False)):
        layer = kind(2, 4, 3, estimator=estimator).train(mode)
        for shape in ((2, 3, *[4] * axes), (4,), (1, 1, 2, *[4] * axes)):
            with pytest.raises(RuntimeError):
                layer(torch.zeros(shape))


# ------------------------------------------------------------------------------------------------------------- in use


@pytest.mark.protects("noise_is_fresh")
@each_class
def test_noise_is_fresh(name: str) -> None:
    """noise_is_fresh: two forwards before one backward have noise of their own, and both gradients are right."""
    for estimator in ESTIMATORS:
        torch.manual_seed(0)
        layer = getattr(bnn, name)(2, 3, 2, delta=0.5, estimator=estimator).train()
        x = torch.randn(2, 2, *[3] * int(name[-2]))
        single = []
        torch.manual_seed(3)
        for _ in range(2):
            layer.zero_grad()
            layer(x).square().sum().backward()
            single.append(layer.weight_rho.grad.clone())
        layer.zero_grad()
        torch.manual_seed(3)
        first, second = layer(x), layer(x)
        assert not torch.equal(first, second)
        (first.square().sum() + second.square().sum()).backward()
        torch.testing.assert_close(layer.weight_rho.grad, single[0] + single[1])


@each_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Zero input has a gradient, and inputs whose squares overflow float16 a finite output, with every padding."""
    modes = ("zeros",) if "Transpose" in name else ("zeros", "reflect", "replicate", "circular")
    for estimator, mode in itertools.product(ESTIMATORS, modes):
        layer = getattr(bnn, name)(2, 2, 3, padding=1, padding_mode=mode, dtype=dtype, estimator=estimator).train()
        for value in (0.0, 500.0):
            layer.zero_grad()
            y = layer(torch.full((2, 2, *[3] * int(name[-2])), value, dtype=dtype))
            assert y.dtype == dtype and y.isfinite().all()
            y.float().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
            assert layer.weight_rho.dtype == torch.float32
        with torch.autocast("cpu", dtype=dtype):
            assert layer.float()(torch.full((2, 2, *[3] * int(name[-2])), 500.0)).isfinite().all()


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("name", "estimator"), list(zip(NAMES, sorted(ESTIMATORS) * 2, strict=True)))
def test_compiles_in_one_graph(name: str, estimator: str) -> None:
    """No graph break; fresh noise at each call; rho gets its gradient; eval is the mean."""
    layer = getattr(bnn, name)(2, 4, 3, padding=1, groups=2, estimator=estimator).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 2, *[3] * int(name[-2]))
    a, b = compiled(x), compiled(x)
    assert a.shape == layer(x).shape and not torch.equal(a, b)
    a.square().sum().backward()
    assert layer.weight_rho.grad is not None and layer.weight_rho.grad.abs().max() > 0
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


@each_class
def test_copies(name: str) -> None:
    """deepcopy and pickle: the same draws and nothing shared."""
    layer = getattr(bnn, name)(2, 3, 2, stride=2, estimator="flipout").train()
    x = torch.randn(2, 2, *[4] * int(name[-2]))
    with fixed_draw(layer, 4):
        expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with fixed_draw(other, 4):
            assert torch.equal(other(x), expected)
        assert type(other) is type(layer) and not {id(p) for p in other.parameters()} & {
            id(p) for p in layer.parameters()
        }


def test_channels_last() -> None:
    """The noise depends on the element, not on where it lies in memory; scales follow the layout."""
    torch.manual_seed(0)
    layer, x = bnn.Conv2d(4, 6, 3).train(), torch.randn(2, 4, 5, 5)
    with fixed_draw(layer, 0):
        expected = layer(x)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with fixed_draw(layer, 0):
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)


def network() -> nn.Module:
    """All six classes, one after the other."""
    layers = [
        nn.Conv1d(3, 4, 3, padding=1),
        nn.ConvTranspose1d(4, 4, 2),
        nn.Tanh(),
        nn.Unflatten(2, (3, 3)),
        nn.Conv2d(4, 4, 3, groups=2, padding="same", padding_mode="reflect"),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Tanh(),
        nn.Unflatten(3, (2, 2)),
        nn.Conv3d(2, 2, (2, 1, 1)),
        nn.ConvTranspose3d(2, 1, (2, 1, 1)),
        nn.Flatten(),
        nn.Linear(16, 2),
    ]
    return nn.Sequential(*layers)


def test_conversion_and_back() -> None:
    """In place, by exact class; the mean bit for bit; a draw is the original at mu + sigma eps; and undone."""
    torch.manual_seed(0)
    original, x = network(), torch.randn(2, 3, 8)
    model = to_bayesian(copy.deepcopy(original), delta=0.1)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, bnn.BayesianModule)}
    assert kinds == {*NAMES, "Linear"} and summary(model).coverage == 1.0
    assert torch.equal(model.eval()(x), original(x))
    weights = {
        name: value.detach() + sigma(model.get_parameter(f"{name}_rho")) * dense_noise(key_of(0, 2, name), value.shape)
        for name, value in original.named_parameters()
    }
    expected = functional_call(original, {name: value.float() for name, value in weights.items()}, x)
    with fixed_draw(model, 2):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(to_deterministic(model)(x), original(x))
    assert not any(isinstance(module, bnn.BayesianModule) for module in model.modules())


@each_estimator
def test_recomputation_finds_the_same_draw(estimator: str) -> None:
    """Gradients with activation checkpointing equal those without, bit for bit."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    found = []
    for wrap in (nn.Sequential, Checkpointed):
        torch.manual_seed(0)
        model = to_bayesian(network(), delta=0.3, freeze=False, estimator=estimator).train()
        x = torch.randn(2, 3, 8)
        torch.manual_seed(5)
        wrap(model)(x).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_tied_kernel_is_one_draw() -> None:
    """Two convolutions that share a kernel cancel in every draw; leaving one of them out is refused."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.Conv2d(2, 2, 3, bias=False) for _ in range(2))
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Any:
            return self.left(x) - self.right(x)

    for estimator in ("reparameterization", "flipout"):
        model = to_bayesian(Twins(), delta=0.5, estimator=estimator).train()
        assert model(torch.randn(2, 2, 4, 4)).abs().max() == 0
        assert len(summary(model).tensors) == 1
    with pytest.raises(ValueError, match="'right' shares its weight with 'left'"):
        to_bayesian(Twins(), target_modules=["left"])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_stays_deterministic() -> None:
    """A kernel that is computed from other parameters, or complex: skipped with the reason."""
    model = nn.ModuleDict({
        "plain": nn.Conv2d(1, 1, 1),
        "old": torch.nn.utils.weight_norm(nn.Conv1d(2, 2, 3)),
        "new": torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3)),
        "spectral": torch.nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(2, 2, 3)),
        "complex": nn.Conv1d(2, 2, 3, dtype=torch.complex64),
    })
    skipped = summary(to_bayesian(model)).skipped
    assert isinstance(model["plain"], bnn.Conv2d)
    assert all("computed from other parameters" in skipped[name] for name in ("old", "new", "spectral"))
    assert "not a floating-point" in skipped["complex"]
    assert not any(isinstance(model[name], bnn.BayesianModule) for name in model if name != "plain")


class Standardised(nn.Conv1d):
    """A forward of its own, as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight - self.weight.mean(), self.bias)


class Reader(nn.Module):
    """Reads its child's kernel and never calls it, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.conv.weight, self.conv.bias, groups=2)


class Padded(nn.Conv1d):
    """Adds to torch's forward, as in Perceiver."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3)
        self.pad = nn.ConstantPad1d(1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


@pytest.mark.parametrize("make", [lambda: Standardised(2, 2, 3), Reader, Padded])
def test_kernels_in_other_hands(make: Callable[[], nn.Module]) -> None:
    """A draw reaches a kernel that a subclass or the parent uses, or the layer would count in the KL for nothing."""
    torch.manual_seed(0)
    original, x = nn.Sequential(make()), torch.randn(2, 2, 5)
    model = to_bayesian(copy.deepcopy(original), delta=0.2).eval()
    assert torch.equal(model(x), original(x))
    weights = {
        name: value.detach() + sigma(model.get_parameter(f"{name}_rho")) * dense_noise(key_of(0, 1, name), value.shape)
        for name, value in original.named_parameters()
    }
    expected = functional_call(original, {name: value.float() for name, value in weights.items()}, x)
    with fixed_draw(model, 1):
        torch.testing.assert_close(model(x), expected)


def test_every_class_is_tested() -> None:
    assert {cls.__name__ for cls in vars(bnn).values() if isinstance(cls, type) and issubclass(cls, _ConvNd)} == {
        *NAMES
    }
