"""Flipout and local reparameterization of recurrent layers: what each promises, example by example and gate by gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import bayeformers.nn as bnn
from bayeformers import fixed_draw, to_bayesian
from bayeformers.nn import ESTIMATORS, training_draw
from bayeformers.nn.recurrence import CELLS, Recurrence, Weights
from tests.nn.sequences import Case, assert_same, cases, noise_of_draw, signs_of_draw, weights_of
from tests.reference import sigma, sigma_slope

KINDS = ["LSTM", "GRU"]
FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def run_each(layer: Any, case: Case, weights: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Any]]:
    """torch's layer with weights of its own for each example: outputs (T_b, features) and states, by example."""
    plain, outputs, states = case.plain(), [], []
    for number, (x, own) in enumerate(zip(case.examples(), weights, strict=True)):
        sequence = x.unsqueeze(0 if case.arguments["batch_first"] else 1)
        output, state = functional_call(plain, own, (sequence, case.state_of(number)))
        outputs.append(output.flatten(0, 1))
        states.append(state)
    return outputs, states


def joined(case: Case, outputs: list[Tensor], states: list[Any]) -> Any:
    """Outputs and states of single examples in the form of the case's input."""
    if case.kind == "LSTM":
        hidden: Any = tuple(torch.cat([state[k] for state in states], 1) for k in range(2))
    else:
        hidden = torch.cat(states, 1)
    if case.form.startswith("packed"):
        like = case.input()
        assert isinstance(like, PackedSequence)
        return PackedSequence(pack_sequence(outputs, enforce_sorted=False).data, *like[1:]), hidden
    if case.form == "unbatched":
        hidden = tuple(s.squeeze(1) for s in hidden) if isinstance(hidden, tuple) else hidden.squeeze(1)
        return outputs[0], hidden
    return torch.stack(outputs, 0 if case.arguments["batch_first"] else 1), hidden


def flipped(layer: Any, examples: int) -> list[dict[str, Tensor]]:
    """mu + sigma * eps * t_b r_b^T of each example, under the running draw."""
    draw = layer.scope.running
    noise = noise_of_draw(layer, draw)
    signs = {name: signs_of_draw(layer, draw, name, examples) for name in noise}
    return [weights_of(layer, {name: noise[name] * signs[name][b] for name in noise}) for b in range(examples)]


@pytest.mark.parametrize("kind", KINDS)
def test_flipout_is_one_network_per_example(kind: str) -> None:
    """Exactly: each example's outputs and states are torch's with W = mu + sigma eps t r^T, signs shared by all steps.

    Signs per step, or weights per step, fail this at once.
    """

    @FEW
    @given(cases(kind))
    def check(case: Case) -> None:
        layer = case.bayesian("flipout")
        with training_draw(layer):
            output = layer(case.input(), case.states())
            weights = flipped(layer, len(case.lengths))
        assert_same(output, joined(case, *run_each(layer, case, weights)), 1e-10)

    check()


@pytest.mark.parametrize("estimator", ["flipout", "local_reparameterization"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_the_loop_is_torch(kind: str, estimator: str) -> None:
    """At the floor of the scales, 1e-8: all arguments and forms."""

    @FEW
    @given(cases(kind))
    def check(case: Case) -> None:
        layer = case.bayesian(estimator)
        with torch.no_grad():
            for name in layer.specs:
                layer.get_parameter(f"{name}_rho").fill_(-200.0)
        assert_same(layer(case.input(), case.states()), case.plain()(case.input(), case.states()), 1e-5)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_signs_do_not_depend_on_the_packing(kind: str) -> None:
    """Within one draw an example has one network, packed in any order or padded: a layer may be called twice."""
    layer = getattr(bnn, kind)(3, 4, 2, estimator="flipout", dtype=torch.float64).train()
    x, lengths = torch.randn(5, 4, 3, dtype=torch.float64), torch.tensor([2, 5, 1, 4])
    with training_draw(layer):
        padded = layer(x)[0]
        packed, _ = pad_packed_sequence(layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])
    for number, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(packed[:length, number], padded[:length, number], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_networks_of_their_own(kind: str) -> None:
    """Equal examples give different outputs under flipout and local noise, equal ones under reparameterization."""
    x = torch.randn(6, 1, 3).expand(6, 2, 3)
    for estimator in ESTIMATORS:
        output = getattr(bnn, kind)(3, 4, estimator=estimator, delta=0.3).train()(x)[0]
        assert torch.equal(output[:, 0], output[:, 1]) == (estimator == "reparameterization")


# ---------------------------------------------------------------------------------------------- gates and their moments

DRAWS = 1_200


def gates_of(layer: Any, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Both parts of the gates' preactivations at every step, (T, B, gates), with the state held fixed."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = Weights(*(layer.variational(f"{name}_l0") for name in names))
    seen: list[tuple[Tensor, Tensor]] = []

    def record(gates: Tensor, recurrent: Tensor, state: Any, project: Any) -> Any:
        seen.append((gates, recurrent))
        return state

    Recurrence(record, layer.active_estimator, weights, reverse=False)(x, state, None)
    first, second = zip(*seen, strict=True)
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_gates(kind: str, estimator: str) -> None:
    """Mean and covariance of each gate's parts, at two steps of two examples, are what the estimator promises.

    Mean W x + b; covariance of weight sampling, sum_j sigma_W^2 x_j x'_j + sigma_b^2: of all pairs under
    reparameterization, of the steps of one example under flipout, of each element with itself under local noise; 0 for
    other pairs. Within 5.5 standard errors: v v' + c^2 over the draws for Gaussians; below 3 v v' for two examples of
    flipout, whose noise is one eps. 2,000 comparisons: a false alarm has probability < 1e-4.
    """
    layer = getattr(bnn, kind)(2, 3, estimator=estimator, delta=0.5, dtype=torch.float64).train()
    x, h = torch.randn(2, 2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        draws = [gates_of(layer, x, (h,) * CELLS[kind].num_states) for _ in range(DRAWS)]
    example = torch.arange(4) % 2
    pairs = {
        "reparameterization": torch.ones(4, 4),
        "flipout": example[:, None] == example,
        "local_reparameterization": torch.eye(4),
    }[estimator]
    for k, (name, seen) in enumerate((("ih_l0", x), ("hh_l0", h.expand(2, 2, 3)))):
        found, seen = torch.stack([draw[k] for draw in draws]).flatten(1, 2), seen.flatten(0, 1)  # (n, 4, gates)
        weight, bias = (layer.get_parameter(f"{p}_{name}").detach() for p in ("weight", "bias"))
        var_w, var_b = (sigma(layer.get_parameter(f"{p}_{name}_rho")).square() for p in ("weight", "bias"))
        expected = torch.einsum("id,jd,gd->gij", seen, seen, var_w) + var_b[:, None, None]
        variance = expected.diagonal(dim1=1, dim2=2)
        expected = expected * pairs
        deviation = found - (seen @ weight.T + bias)
        assert (deviation.mean(0).T.abs() < 5.5 * (variance / DRAWS).sqrt()).all()
        covariance = torch.einsum("nig,njg->gij", deviation, deviation) / DRAWS
        product = variance[:, :, None] * variance[:, None, :]
        spread = torch.where(pairs > 0, product + expected.square(), 3 * product)
        assert ((covariance - expected).abs() < 5.5 * (spread / DRAWS).sqrt()).all()


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS)
def test_flipout_gradients(kind: str) -> None:
    """By mean and rho, float64: each example's loss differentiated through its own network."""
    arguments = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": True, "batch_first": True}
    case = Case(kind, arguments | {"bidirectional": True}, "packed", [2, 5, 3], with_states=True, seed=3)
    layer = case.bayesian("flipout", delta=0.3)
    with training_draw(layer):
        output, hidden = layer(case.input(), case.states())
        draw, weights = layer.scope.running, flipped(layer, 3)
    last = hidden[0] if kind == "LSTM" else hidden
    (output.data.sin().sum() + last.square().sum()).backward()
    weights = [{name: value.requires_grad_() for name, value in own.items()} for own in weights]
    outputs, states = run_each(layer, case, weights)
    finals = [state[0] if kind == "LSTM" else state for state in states]
    sum(o.sin().sum() + s.square().sum() for o, s in zip(outputs, finals, strict=True)).backward()
    noise = noise_of_draw(layer, draw)
    for name in noise:
        signs = signs_of_draw(layer, draw, name, 3)
        by_weight = torch.stack([own[name].grad for own in weights])
        slope = sigma_slope(layer.get_parameter(f"{name}_rho"))
        torch.testing.assert_close(layer.get_parameter(name).grad, by_weight.sum(0), rtol=1e-8, atol=1e-10)
        by_rho = ((by_weight * signs).sum(0) * noise[name] * slope).float()
        torch.testing.assert_close(layer.get_parameter(f"{name}_rho").grad, by_rho, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_local_gradients(kind: str) -> None:
    """By mean and rho: central differences along random directions, with the same noise on both sides."""
    layer = getattr(bnn, kind)(3, 4, 2, bidirectional=True, dtype=torch.float64, estimator="local_reparameterization")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    leaves = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(4)
        return functional_call(layer.train(), values, (x,))[0].tanh().sum()  # type: ignore[no-any-return]

    gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
    step = 1e-5
    for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
        direction = torch.randn_like(value)
        with torch.no_grad():
            ahead, behind = (loss(leaves | {name: value + h * direction}) for h in (step, -step))
        found = float((gradient * direction).sum())
        assert abs(float(ahead - behind) / (2 * step) - found) < 1e-6 * (1 + abs(found)), name


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind: str, estimator: str) -> None:
    """Recomputed in backward with the draw of the forward: gradients as without it."""
    model = nn.Sequential(getattr(nn, kind)(3, 4, 2))
    to_bayesian(model, estimator=estimator, freeze=False, delta=0.3).train()
    x, found = torch.randn(5, 2, 3, requires_grad=True), []
    for recompute in (False, True):
        torch.manual_seed(9)
        model.zero_grad()
        output = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        output[0].square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_dropout_acts_between_layers(estimator: str) -> None:
    """Rate 1 leaves the last layer without input; the first layer's states are as without dropout."""
    for kind in KINDS:
        layer = getattr(bnn, kind)(3, 4, 2, dropout=1.0, estimator=estimator, delta=1e-12).train()
        plain = getattr(nn, kind)(3, 4, 2, dropout=1.0)
        plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "rho" not in name})
        x = torch.randn(5, 2, 3)
        assert_same(layer(x), plain(x), 1e-5)


def test_a_held_draw_wins() -> None:
    """Prediction is one network, whatever the estimator: examples of a held draw are alike."""
    x = torch.randn(6, 1, 3).expand(6, 2, 3)
    for estimator in ESTIMATORS:
        layer = bnn.LSTM(3, 4, estimator=estimator, delta=0.3).train()
        with fixed_draw(layer, 0):
            output = layer(x)[0]
        assert torch.equal(output[:, 0], output[:, 1])
