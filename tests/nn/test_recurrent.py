"""`LSTM` and `GRU`: every argument of torch's, one draw per sequence, and torch's outputs and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import bayeformers.nn as bnn
from bayeformers import fixed_draw, kl_divergence, posterior_mean, to_bayesian
from bayeformers.nn import ESTIMATORS, training_draw, variational_tensors
from bayeformers.nn.variational import Draw
from tests.nn.sequences import Case, Tagger, assert_same, cases, nll, noise_of_draw, same_form, weights_of
from tests.reference import kl_by_quadrature, normal_log_density, sigma, sigma_slope

KINDS = ["LSTM", "GRU"]
EXACT = settings(max_examples=200, derandomize=True, deadline=None, database=None)
estimators = st.sampled_from(sorted(ESTIMATORS))


# ------------------------------------------------------------------------------------------------ equality with torch


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_mean_is_torch(kind: str) -> None:
    """Bit for bit, all arguments and forms: in `eval()`, and with torch's dropout in `train()` under the mean."""

    @EXACT
    @given(cases(kind, dropout=True), estimators)
    def check(case: Case, estimator: str) -> None:
        plain, layer = case.plain(), case.bayesian(estimator)
        assert_same(layer.eval()(case.input(), case.states()), plain.eval()(case.input(), case.states()))
        outputs = []
        for module in (layer.train(), plain.train()):
            torch.manual_seed(1)
            with posterior_mean(module):
                outputs.append(module(case.input(), case.states()))
        assert_same(*outputs)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_draw_is_torch_with_drawn_weights(kind: str) -> None:
    """mu + sigma * eps loaded into torch's layer, for all arguments and forms, whatever the estimator."""

    @EXACT
    @given(cases(kind, dropout=True), estimators, st.booleans(), st.booleans())
    def check(case: Case, estimator: str, train: bool, gradient: bool) -> None:
        plain, layer = case.plain(), case.bayesian(estimator)
        plain.load_state_dict(weights_of(layer, noise_of_draw(layer, Draw(7, 3))))
        with fixed_draw(layer, 3, seed=7), torch.set_grad_enabled(gradient):
            torch.manual_seed(1)
            output = layer.train(train)(case.input(), case.states())
            torch.manual_seed(1)
            assert_same(output, plain.train(train)(case.input(), case.states()), 1e-10)

    check()


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind: str, dtype: torch.dtype, estimator: str) -> None:
    """Outputs, states and gradients in the layer's dtype; scales stay float32, and so do their gradients."""
    layer = to_bayesian(getattr(nn, kind)(3, 4, 2, bidirectional=True, dtype=dtype), estimator=estimator, freeze=False)
    output = layer.train()(torch.randn(5, 2, 3, dtype=dtype))
    assert same_form(output, getattr(nn, kind)(3, 4, 2, bidirectional=True, dtype=dtype)(torch.ones(5, 2, 3).to(dtype)))
    output[0].float().square().sum().backward()
    for tensor in variational_tensors(layer):
        assert tensor.loc.grad is not None and tensor.loc.grad.dtype == dtype and tensor.loc.grad.isfinite().all()
        assert tensor.rho.grad is not None and tensor.rho.grad.dtype == torch.float32
        assert tensor.rho.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- gradients


def reference_gradients(layer: Any, loss_of: Callable[[dict[str, Tensor]], Tensor], draw: Draw) -> dict[str, Tensor]:
    """Gradients by mean and by rho of a loss of the drawn weights."""
    noise = noise_of_draw(layer, draw)
    leaves = {name: value.requires_grad_() for name, value in weights_of(layer, noise).items()}
    by_weight = dict(zip(leaves, torch.autograd.grad(loss_of(leaves), list(leaves.values())), strict=True))
    by_rho = {
        f"{name}_rho": by_weight[name] * noise[name] * sigma_slope(layer.get_parameter(f"{name}_rho"))
        for name in leaves
    }
    return by_weight | by_rho


def assert_gradients(layer: Any, expected: dict[str, Tensor]) -> None:
    assert set(expected) == {name for name, _ in layer.named_parameters()}
    for name, gradient in expected.items():
        found = layer.get_parameter(name).grad.double()
        torch.testing.assert_close(found, gradient, rtol=2e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_nll_and_kl(kind: str) -> None:
    """float64, by mean and by rho, against torch's layer as a function of its weights and a KL written out."""
    layer = getattr(bnn, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64, delta=0.3).train()
    plain = getattr(nn, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with training_draw(layer):
        nll(layer(x)).backward()
        draw = layer.scope.running
    expected = reference_gradients(layer, lambda weights: nll(functional_call(plain, weights, (x,))), draw)
    assert_gradients(layer, expected)
    kl_divergence(layer).backward()
    for name in layer.specs:  # prior N(0, 1): KL = sum (sigma^2 + mu^2 - 1) / 2 - log sigma
        mu, rho = layer.get_parameter(name).detach(), layer.get_parameter(f"{name}_rho")
        expected[name] = expected[name] + mu
        expected[f"{name}_rho"] = expected[f"{name}_rho"] + (sigma(rho) - 1 / sigma(rho)) * sigma_slope(rho)
    assert_gradients(layer, expected)


# ---------------------------------------------------------------------------------------------------------- properties


def stepwise(plain: Any, x: Tensor, weights: Callable[[], dict[str, Tensor]]) -> Tensor:
    """Outputs of torch's layer that asks for its weights at every time step."""
    outputs, hidden = [], None
    for step in x:
        output, hidden = functional_call(plain, weights(), (step[None], hidden))
        outputs.append(output)
    return torch.cat(outputs)


@pytest.mark.protects("one_draw_per_sequence")
@pytest.mark.parametrize("kind", KINDS)
def test_one_draw_per_sequence(kind: str) -> None:
    """Outputs of all steps are those of one network; weights that are redrawn at every step are not."""
    layer, plain = (getattr(m, kind)(3, 4, dtype=torch.float64) for m in (bnn, nn))
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with training_draw(layer.train()):
        output = layer(x)[0]
        draws = [layer.scope.running, *(Draw(seed) for seed in range(5))]
    each = [weights_of(layer, noise_of_draw(layer, draw)) for draw in draws]

    def is_one_network(output: Tensor) -> bool:
        return torch.allclose(output, functional_call(plain, each[0], (x,))[0], rtol=1e-10, atol=1e-10)

    assert is_one_network(output)
    assert is_one_network(stepwise(plain, x, lambda: each[0]))
    redrawn = iter(each)
    assert not is_one_network(stepwise(plain, x, lambda: next(redrawn)))


@pytest.mark.protects("kl_counted_once")
def test_kl_counted_once() -> None:
    """The KL is that of the distinct weights, whatever the number of modules around them, steps and forwards."""
    model = Tagger(num_layers=2)
    to_bayesian(model, delta=0.2, freeze=False, target_modules=["rnn"])
    tensors = list(variational_tensors(model))
    with torch.no_grad():
        for tensor in tensors:
            tensor.rho.add_(0.1)
    expected = 0.0
    for tensor in tensors:
        initial = 0.2 * tensor.loc.detach().double().abs().clamp_min(0.1 * tensor.loc.detach().double().abs().mean())
        ratio = sigma(tensor.rho) / initial
        expected += float((0.5 * (ratio.square() - 1) - ratio.log()).sum())

    def is_right(value: float) -> bool:
        return abs(value / expected - 1) < 1e-5

    for length in (1, 7):
        model.train()(torch.arange(length)[None])
        assert is_right(float(kl_divergence(model).detach()))
    of_modules = sum(float(kl_divergence(m).detach()) for m in model.modules() if list(variational_tensors(m)))
    assert not is_right(of_modules) and not is_right(7 * expected)
    assert len(tensors) == 8


def test_kl_of_a_weight_by_quadrature() -> None:
    layer = bnn.LSTM(1, 1, bias=False, delta=0.3)
    prior = lambda x: normal_log_density(x, 0.0, 1.0)  # noqa: E731
    parts = [kl_by_quadrature(float(m), float(s), prior) for t in variational_tensors(layer)
             for m, s in zip(t.loc.detach().double().flatten(), sigma(t.rho).flatten(), strict=True)]  # fmt: skip
    assert len(parts) == 8
    torch.testing.assert_close(float(kl_divergence(layer).detach()), sum(parts), rtol=1e-5, atol=0)


@pytest.mark.protects("noise_is_fresh")
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_fresh(kind: str) -> None:
    """Two forwards before one backward: each is differentiated with its own noise, not with the last one's."""
    layer, plain = (getattr(m, kind)(3, 4, dtype=torch.float64) for m in (bnn, nn))
    inputs = [torch.randn(6, 2, 3, dtype=torch.float64) for _ in range(2)]
    losses, expected = [], dict[str, Tensor]()
    for x in inputs:
        with training_draw(layer.train()):
            losses.append(nll(layer(x)))
            draw = layer.scope.running
        own = reference_gradients(layer, lambda weights, x=x: nll(functional_call(plain, weights, (x,))), draw)
        expected = {name: expected.get(name, 0) + gradient for name, gradient in own.items()}
    torch.stack(losses).sum().backward()
    assert_gradients(layer, expected)

    noise = {name: torch.empty_like(layer.get_parameter(name)) for name in layer.specs}
    layer.zero_grad()
    for x in inputs:  # the defect: one buffer of noise, refilled behind autograd's back
        with training_draw(layer):
            loss = 0 * layer(x)[0].sum()
            for name, eps in noise_of_draw(layer, layer.scope.running).items():
                noise[name].data.copy_(eps)
        weights = {n: layer.get_parameter(n) + F.softplus(layer.get_parameter(f"{n}_rho")) * noise[n] for n in noise}
        losses.append(loss + nll(functional_call(plain, weights, (x,))))
    torch.stack(losses[2:]).sum().backward()
    with pytest.raises(AssertionError):
        assert_gradients(layer, expected)


ARGUMENTS = [
    {"num_layers": 2},
    {"bidirectional": True},
    {"batch_first": True},
    {"bias": False},
    {"proj_size": 2},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False, "proj_size": 3},
]


class Cells(nn.Module):
    """The defect: a loop over one cell, which drops all other arguments and returns the last state without axes."""

    def __init__(self, input_size: int, hidden_size: int, **ignored: Any) -> None:
        super().__init__()
        self.inner = nn.LSTM(input_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, (h, c) = self.inner(x)
        return output, (h[-1], c[-1])


@pytest.mark.protects("lstm_is_a_lstm")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_lstm_is_a_lstm(arguments: dict[str, Any], estimator: str) -> None:
    """Parameters, outputs and states are those of torch's layer with the same arguments, in `train()` too."""
    x = torch.randn(6, 2, 3)
    plain = nn.LSTM(3, 4, **arguments)

    def is_a_lstm(layer: nn.Module) -> bool:
        own = {n: p.shape for n, p in layer.named_parameters() if not n.endswith("_rho")}
        same = own == {n: p.shape for n, p in plain.named_parameters()}
        return same and same_form(layer.train()(x), plain(x)) and same_form(layer.eval()(x), plain(x))

    layer = bnn.LSTM(3, 4, estimator=estimator, **arguments)
    assert is_a_lstm(layer) and is_a_lstm(to_bayesian(nn.LSTM(3, 4, **arguments), estimator=estimator))
    assert {spec.name for spec in layer.specs.values()} == {n for n, _ in plain.named_parameters()}
    assert not is_a_lstm(Cells(3, 4, **arguments))
