"""`LSTM` and `GRU` in use: conversion and back, copies and moves, prediction, subclasses, wrong inputs."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.prune import l1_unstructured
from torch.nn.utils.rnn import pack_sequence

import bayeformers.nn as bnn
from bayeformers import fixed_draw, predict, to_bayesian, to_deterministic
from bayeformers.nn import ESTIMATORS, variational_tensors
from bayeformers.nn.variational import Draw
from tests.nn.sequences import Tagger, assert_same, nll, noise_of_draw, weights_of
from tests.reference import dense_noise, key_of, sigma

KINDS = ["LSTM", "GRU"]


# ------------------------------------------------------------------------------------------------- life of the layer


def assert_holds_own_weights(layer: Any) -> None:
    """torch's list of flat weights, and its references, are the layer's Parameters."""
    assert [id(w) for w in layer._flat_weights] == [id(layer.get_parameter(n)) for n in layer._flat_weights_names]
    assert [id(ref()) for ref in layer._flat_weight_refs] == [id(w) for w in layer._flat_weights]
    assert not layer._weights_have_changed()


def reloaded(layer: Any, assign: bool) -> Any:
    other = to_bayesian(type(layer).torch_class(3, 4, 2, bidirectional=True), freeze=False)
    other.load_state_dict(layer.state_dict(), assign=assign)
    return other


def pickled(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": pickled,
    "to": lambda layer: layer.to(torch.bfloat16).to(torch.float32) and layer,
    "flatten": lambda layer: layer.flatten_parameters() or layer,
    "load": lambda layer: reloaded(layer, assign=False),
    "assign": lambda layer: reloaded(layer, assign=True),
    "double": lambda layer: copy.deepcopy(layer).double().float(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_moves(kind: str, way: str) -> None:
    """The mean, a draw and a step of training are right after each of them."""
    layer = to_bayesian(getattr(nn, kind)(3, 4, 2, bidirectional=True), freeze=False)
    x = torch.randn(5, 2, 3)
    if way == "to":
        with torch.no_grad():
            for tensor in variational_tensors(layer):
                tensor.loc.copy_(tensor.loc.bfloat16().float())
    outputs = []
    for module in (layer, WAYS[way](layer)):
        assert_holds_own_weights(module) if way != "assign" else None
        with fixed_draw(module.eval(), 2):
            outputs.append((module(x), None))
        outputs[-1] = (outputs[-1][0], module(x))
    assert_same(outputs[1], outputs[0])
    copied = WAYS[way](layer)
    nll(copied.train()(x)).backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert_holds_own_weights(copied) if way != "assign" else None


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    """In place and back: same object, class, Parameters, dropout, flags and outputs; packed and tied uses work."""
    layer = getattr(nn, kind)(3, 4, 2, dropout=0.5, proj_size=2) if kind == "LSTM" else nn.GRU(3, 4, 2, dropout=0.5)
    before, x = dict(layer.named_parameters()), torch.randn(5, 2, 3)
    expected = layer.eval()(x)
    converted = to_bayesian(layer)
    assert converted is layer and type(layer) is getattr(bnn, kind) and layer.dropout == 0
    assert all(layer.get_parameter(name) is value for name, value in before.items())
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {f"{name}_rho" for name in before}
    assert_same(layer(x), expected)
    assert to_deterministic(layer) is layer and type(layer) is getattr(nn, kind) and layer.dropout == 0.5
    assert dict(layer.named_parameters()).keys() == before.keys() == layer.state_dict().keys()
    assert all(p.requires_grad for p in layer.parameters())
    assert_same(layer.eval()(x), expected)
    assert_holds_own_weights(layer)


def test_nothing_is_written_into_the_layer() -> None:
    """An exception under a draw leaves the layer as it was."""
    layer = bnn.LSTM(3, 4)
    with fixed_draw(layer, 0), pytest.raises(RuntimeError, match="input.size"):
        layer(torch.ones(5, 2, 7))
    assert_holds_own_weights(layer)
    assert layer.draw is None


def test_weights_given_by_a_function_call() -> None:
    """`functional_call` replaces means, which the draw then moves about."""
    layer, x = bnn.GRU(3, 4), torch.randn(5, 2, 3)
    zeros = {name: torch.zeros_like(layer.get_parameter(name)) for name in layer.specs}
    with fixed_draw(layer, 0):
        moved, own = functional_call(layer, zeros, (x,))[0], layer(x)[0]
    assert not torch.equal(moved, own)
    noise = noise_of_draw(layer, Draw(0, 0))
    weights = {n: (sigma(layer.get_parameter(f"{n}_rho")) * noise[n]).float() for n in noise}
    torch.testing.assert_close(moved, functional_call(nn.GRU(3, 4), weights, (x,))[0], rtol=1e-5, atol=1e-6)


def test_reset_parameters() -> None:
    """New means as torch's, new scales with them."""
    layer, plain = bnn.LSTM(3, 4, delta=0.1), nn.LSTM(3, 4)
    for module in (layer, plain):
        torch.manual_seed(5)
        module.reset_parameters()
    for name, value in plain.named_parameters():
        assert torch.equal(layer.get_parameter(name), value)
        limit = 0.1 * value.abs().clamp_min(0.1 * value.abs().mean())
        torch.testing.assert_close(sigma(layer.get_parameter(f"{name}_rho")).float(), limit, rtol=1e-5, atol=0)


def test_computed_weights_are_refused() -> None:
    pruned = nn.LSTM(3, 4)
    l1_unstructured(pruned, "weight_hh_l0", 0.5)
    with pytest.raises(ValueError, match="weight_hh_l0 is computed from other parameters"):
        to_bayesian(pruned)


# -------------------------------------------------------------------------------------------------------- wrong inputs


def wrong_inputs(kind: str) -> dict[str, tuple[Any, Any]]:
    x, h = torch.ones(5, 2, 3), torch.zeros(1, 2, 4)
    both = (lambda a, b: (a, b)) if kind == "LSTM" else (lambda a, b: a)
    return {
        "features": (torch.ones(5, 2, 7), None),
        "one axis": (torch.ones(3), None),
        "four axes": (torch.ones(5, 2, 3, 1), None),
        "no steps": (torch.ones(0, 2, 3), None),
        "dtype": (x.double(), None),
        "batch of the states": (x, both(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))),
        "width of the states": (x, both(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5))),
        "states without batch": (x, both(h[:, 0], h[:, 0])),
        "states with batch": (x[:, 0], both(h, h)),
        "packed features": (pack_sequence([torch.ones(3, 7)]), both(h[:, :1], h[:, :1])),
        "packed features without states": (pack_sequence([torch.ones(3, 7)]), None),
        "packed states": (pack_sequence([torch.ones(3, 3)]), both(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))),
    }


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input(kind: str, estimator: str) -> None:
    """torch's own errors; for packed input too, which torch's LSTM does not check."""
    layer, plain = getattr(bnn, kind)(3, 4, estimator=estimator), getattr(nn, kind)(3, 4)
    for name, (x, hx) in wrong_inputs(kind).items():
        for train in (True, False):
            with pytest.raises((RuntimeError, ValueError)) as found:
                layer.train(train)(x, hx)
            if name.startswith("packed") and kind == "LSTM":
                assert re.search("input.size|Expected hidden", str(found.value))
                continue
            with pytest.raises(type(found.value)) as expected:
                plain(x, hx)
            assert str(expected.value) == str(found.value), name


# -------------------------------------------------------------------------------------------------- inside of a model


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_is_a_mixture_of_networks(kind: str) -> None:
    """S draws: log of the mean probability of S plain models with drawn weights, flipout in training or not."""
    model = to_bayesian(Tagger(kind, num_layers=2), delta=0.5, estimator="flipout").eval()
    ids = torch.arange(6).view(2, 3)
    expected = []
    for draw in range(4):
        with fixed_draw(model, draw, seed=5):
            plain = Tagger(kind, num_layers=2)
            values = {name: model.get_parameter(name).detach() for name, _ in plain.named_parameters()}
            noise = dense_noise_of(model, draw, seed=5)
            values |= {n: (values[n] + sigma(model.get_parameter(f"{n}_rho")) * noise[n]).float() for n in noise}
            hidden = model.table(ids)
        weights = {n.removeprefix("rnn."): v for n, v in values.items() if n.startswith("rnn.")}
        last = functional_call(plain.rnn, weights, (hidden,))[0][:, -1]
        expected.append(F.linear(last, values["head.weight"], values["head.bias"]).log_softmax(-1))
    found = predict(model, ids, num_samples=4, seed=5)
    torch.testing.assert_close(found.log_probs.float(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def dense_noise_of(model: nn.Module, draw: int, seed: int) -> dict[str, Tensor]:
    """eps of all but the table."""
    names = [t.name for t in variational_tensors(model) if not t.name.startswith("table")]
    return {n: dense_noise(key_of(seed, draw, n), tuple(model.get_parameter(n).shape)).double() for n in names}


@pytest.mark.parametrize("kind", KINDS)
def test_linearised_prediction(kind: str) -> None:
    """Every method takes the layer's tensors one by one; see test_linearized for the numbers."""
    model = to_bayesian(Tagger(kind)).eval()
    for method in ("glm", "mc_glm", "lr_glm", "e_glm"):
        assert predict(model, torch.arange(6).view(2, 3), method=method).probs.shape == (2, 2)


def test_a_subclass_that_adds_to_forward() -> None:
    """A subclass that calls `super().forward` takes the draw; one that reads a weight of its own does not convert."""
    layer = Doubled(3, 4)
    x, before = torch.randn(5, 2, 3), layer(torch.ones(5, 2, 3))[0]
    to_bayesian(layer, estimator="flipout")
    assert torch.equal(layer.eval()(torch.ones(5, 2, 3))[0], before)
    with fixed_draw(layer, 1):
        weights = {n: v.float() for n, v in weights_of(layer, noise_of_draw(layer, Draw(0, 1))).items()}
        torch.testing.assert_close(layer(x)[0], 2 * functional_call(nn.LSTM(3, 4), weights, (x,))[0])
    assert layer.train()(x)[0].shape == (5, 2, 4)
    with pytest.raises(ValueError, match="Reading is not a supported layer"):
        to_bayesian(Reading(3, 4))


class Doubled(nn.LSTM):
    """Adds to torch's forward."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, hidden = super().forward(input, hx)
        return 2 * output, hidden


class Reading(nn.LSTM):
    """Reads a weight besides."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, hidden = super().forward(input, hx)
        return output + self.weight_hh_l0.norm(), hidden
