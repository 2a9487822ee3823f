"""`MultiheadAttention`: torch's arithmetic for every argument; all of its tensors drawn, on every path."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

import bayeformers.nn as bnn
from bayeformers import NormalPrior, fixed_draw, kl_divergence, posterior_mean, to_bayesian, to_deterministic
from bayeformers.nn import training_draw, variational_tensors
from bayeformers.nn.base import BayesianModule
from tests.reference import noise_of, sigma, sigma_slope

ESTIMATORS = sorted(bnn.ESTIMATORS)
NAMES = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v"]
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "separate": {"kdim": 6, "vdim": 5},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False, "batch_first": True},
}


def plain(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    """Two heads of width 4 in float64, no weight of which is 0."""
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def inputs(layer: nn.MultiheadAttention, batch: int | None = 3, queries: int = 4, keys: int = 5) -> tuple[Tensor, ...]:
    shapes = [(queries, 8), (keys, layer.kdim), (keys, layer.vdim)]
    if batch is not None:
        shapes = [(batch, *shape) if layer.batch_first else (shape[0], batch, shape[1]) for shape in shapes]
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def drawn(layer: nn.MultiheadAttention, index: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a draw of a converted layer, from the reference noise."""
    own = copy.deepcopy(layer)
    noise = noise_of(to_deterministic(own), {"": "MultiheadAttention", "out_proj": "Linear"}, index, seed)
    return {n: layer.get_parameter(n) + sigma(layer.get_parameter(f"{n}_rho")) * eps for n, eps in noise.items()}


@st.composite
def calls(draw: st.DrawFn) -> tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]:
    """A layer, its inputs, and masks of every kind."""
    flags = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    sharing = draw(st.sampled_from(["one", "two", "none", "widths"]))
    layer = plain(draw(st.integers(0, 99)), **flags, **({"kdim": 6, "vdim": 5} if sharing == "widths" else {}))
    batch = draw(st.sampled_from([None, 1, 3]))
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    query, key, value = inputs(layer, batch, queries, queries if sharing == "one" else keys)
    keys = queries if sharing == "one" else keys
    given_inputs = {"one": (query, query, query), "two": (query, key, key)}.get(sharing, (query, key, value))
    boolean, causal = draw(st.booleans()), draw(st.booleans())

    def mask(*shape: int) -> Tensor:
        return torch.rand(shape) < 0.3 if boolean else torch.randn(shape, dtype=torch.float64)

    call: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    if draw(st.booleans()):
        call["key_padding_mask"] = mask(keys) if batch is None else mask(batch, keys)
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        call["attn_mask"] = hidden if boolean else torch.zeros(queries, keys).double().masked_fill(hidden, -math.inf)
        call["is_causal"] = True
    elif draw(st.booleans()):
        heads = 2 * (1 if batch is None else batch)
        call["attn_mask"] = mask(queries, keys) if draw(st.booleans()) else mask(heads, queries, keys)
    return layer, given_inputs, call


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls(), st.sampled_from(["flipout", "local_reparameterization"]))
def test_torch_for_every_argument(case: tuple[Any, tuple[Tensor, ...], dict[str, Any]], estimator: str) -> None:
    """The mean in `train()` and on the fused path; a draw; the estimators' own arithmetic at a scale of 1e-8."""
    layer, given_inputs, call = case
    bayesian: Any = to_bayesian(copy.deepcopy(layer), 0.2, estimator=estimator)
    with torch.no_grad():
        expected, expected_weights = layer.train()(*given_inputs, **call)
        with posterior_mean(bayesian.train()):
            output, weights = bayesian(*given_inputs, **call)
        fused, fused_weights = bayesian.eval()(*given_inputs, **call)
        with fixed_draw(bayesian, 1, seed=2):
            of_draw, weights_of_draw = bayesian(*given_inputs, **call)
        for tensor in variational_tensors(bayesian):
            tensor.rho.fill_(-50.0)
        close, close_weights = bayesian.train()(*given_inputs, **call)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        plain_fused, plain_fused_weights = layer.eval()(*given_inputs, **call)
        torch.testing.assert_close(fused, plain_fused, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(close, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        reference: Any = to_bayesian(copy.deepcopy(layer), 0.2)
        sampled, sampled_weights = functional_call(layer.train(), drawn(reference, 1, 2), given_inputs, call)
        torch.testing.assert_close(of_draw, sampled, rtol=1e-6, atol=1e-6, equal_nan=True)
    pairs = [
        (weights, expected_weights),
        (fused_weights, plain_fused_weights),
        (close_weights, expected_weights),
        (weights_of_draw, sampled_weights),
    ]
    for got, wanted in pairs:
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["one", "two", "none"])
def test_flipout_is_one_network_per_example(kind: str, sharing: str) -> None:
    """Example n sees W + (t_n r_n^T) * sigma eps, b + t_n * sigma_b eps_b: torch's layer with these, one by one."""
    layer: Any = to_bayesian(plain(**KINDS[kind]), 0.3, estimator="flipout").train()
    query, key, value = inputs(layer)
    if kind != "separate":
        query, key, value = {"one": (query,) * 3, "two": (query, key, key)}.get(sharing, (query, key, value))
    rest = to_deterministic(copy.deepcopy(layer))
    with torch.no_grad(), training_draw(layer):
        output, weights = layer(query, key, value)
        again, _ = layer(query, key, value)
        networks = [network(layer, example, examples=3) for example in range(3)]
    assert torch.equal(output, again)  # one draw and one sign per example in all uses of a forward
    axis = 0 if layer.batch_first else 1
    for example, tensors in enumerate(networks):
        one = tuple(x.narrow(axis, example, 1) for x in (query, key, value))
        expected, expected_weights = functional_call(rest, tensors, one)
        torch.testing.assert_close(output.narrow(axis, example, 1), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weights[example : example + 1], expected_weights, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(networks[0]["out_proj.weight"], networks[1]["out_proj.weight"])


def network(layer: Any, example: int, examples: int) -> dict[str, Tensor]:
    """The weights that flipout gives one example."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in (("", layer), ("out_proj.", layer.out_proj)):
        for name in module.specs:
            value = module.variational(name)
            if name.startswith("bias_"):
                tensors[name] = value.sample()
            elif value.loc.dim() == 2:
                by_row, by_column = (
                    value.draw.signs(value.spec, axis, (examples, size), value.loc.device)[example].double()
                    for axis, size in enumerate(value.loc.shape)
                )
                tensors[prefix + name] = value.loc + torch.outer(by_row, by_column) * value.perturbation
                rows = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}.get(name)
                bias = module.maybe("in_proj_bias" if not prefix else "bias")
                if bias is not None:
                    key = prefix + ("in_proj_bias" if not prefix else "bias")
                    tensors.setdefault(key, bias.loc.clone())
                    part = slice(None) if rows is None else slice(8 * rows, 8 * rows + 8)
                    tensors[key][part] += by_row * bias.perturbation[part]
    return tensors


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_moments_of_values(estimator: str) -> None:
    """With one key the output is W_v x + b_v: its mean and covariance, from 2,000 forwards, within 5 standard errors.

    Reparameterization: one weight for all positions and examples. Flipout: that within an example, none between them.
    Local reparameterization: elements of their own. A variance has relative error sqrt(2 / S), a covariance of c has
    an error of at most sqrt(2 / S) times both scales; 5 standard errors among 1,000 numbers fail once in 1,000.
    """
    draws = 2000
    layer: Any = to_bayesian(plain(batch_first=True), 0.3, estimator=estimator, exclude_modules=["out_proj"]).train()
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(8))
        layer.out_proj.bias.zero_()
    x = torch.randn(2, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        outputs = torch.stack([layer(x, x, x, need_weights=False)[0].flatten() for _ in range(draws)])
    loc, scale = layer.in_proj_weight[16:].detach(), sigma(layer.in_proj_weight_rho)[16:]
    loc_b, scale_b = layer.in_proj_bias[16:].detach(), sigma(layer.in_proj_bias_rho)[16:]
    flat = x.squeeze(1)
    mean = (flat @ loc.T + loc_b).flatten()
    same_row = torch.einsum("ni,mi,oi->nom", flat, flat, scale.square()) + scale_b.square()[:, None]
    covariance = torch.einsum("nom,op->nomp", same_row, torch.eye(8, dtype=torch.float64)).reshape(16, 16)
    if estimator != "reparameterization":
        covariance = covariance * torch.block_diag(*[torch.ones(8, 8)] * 2)
    spread = covariance.diagonal().sqrt()
    assert ((outputs.mean(0) - mean).abs() < 5 * spread / math.sqrt(draws)).all()
    assert ((outputs.T.cov() - covariance).abs() < 5 * math.sqrt(2 / draws) * torch.outer(spread, spread)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_nll_and_kl(kind: str) -> None:
    """All means and scales, float64, against torch's layer with mu + sigma eps."""
    layer: Any = to_bayesian(plain(**KINDS[kind]), 0.3, freeze=False, prior=NormalPrior(0.5, 0.1))
    given_inputs = inputs(layer)
    rest = to_deterministic(copy.deepcopy(layer))
    with fixed_draw(layer.train(), 4, seed=3):
        output, weights = layer(*given_inputs)
        (output.tanh().sum() + weights.square().sum() + 0.01 * kl_divergence(layer)).backward()
    names = [name for name, _ in rest.named_parameters()]
    noise = noise_of(rest, {"": "MultiheadAttention", "out_proj": "Linear"}, 4, 3)
    means = {n: layer.get_parameter(n).detach().clone().requires_grad_() for n in names}
    scales = {n: sigma(layer.get_parameter(f"{n}_rho")).requires_grad_() for n in names}
    output, weights = functional_call(rest, {n: means[n] + scales[n] * noise[n] for n in names}, given_inputs)
    prior = torch.distributions.Normal(torch.tensor(0.1).double(), torch.tensor(0.5).double())
    divergence = sum(
        torch.distributions.kl_divergence(torch.distributions.Normal(means[n], scales[n]), prior).sum() for n in names
    )
    (output.tanh().sum() + weights.square().sum() + 0.01 * divergence).backward()
    for name in names:
        torch.testing.assert_close(layer.get_parameter(name).grad, means[name].grad, rtol=1e-5, atol=1e-7)
        rho = layer.get_parameter(f"{name}_rho")
        slope = scales[name].grad * sigma_slope(rho)  # type: ignore[operator]
        torch.testing.assert_close(rho.grad, slope.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_takes_the_held_draw_in_eval(nested: bool, norm_first: bool) -> None:
    """Torch's fused encoder, which reads Parameters, is not taken: each draw is torch's encoder with its weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not norm_first).eval()
    rest = copy.deepcopy(encoder)
    model = to_bayesian(encoder, 0.4)
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    owners = {
        name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, BayesianModule)
    }
    weights = {
        name: model.get_parameter(name) + sigma(model.get_parameter(f"{name}_rho")).float() * eps
        for name, eps in noise_of(rest, owners, 1).items()
    }
    assert sum(name.endswith(("in_proj_weight", "out_proj.weight", "out_proj.bias")) for name in weights) == 6
    with torch.no_grad(), fixed_draw(model, 1):
        output = model(x, src_key_padding_mask=padding)
    expected = functional_call(rest.train(), weights, (x,), {"src_key_padding_mask": padding})
    torch.testing.assert_close(output[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_training_draws_change_and_reach_every_tensor() -> None:
    """One draw per forward; rho of every tensor gets a gradient, under each estimator."""
    for estimator, (kind, options) in itertools.product(ESTIMATORS, KINDS.items()):
        layer: Any = to_bayesian(plain(**options), 0.3, estimator=estimator).train()
        given_inputs = inputs(layer)
        first, second = layer(*given_inputs)[0], layer(*given_inputs)[0]
        assert not torch.equal(first, second)
        first.square().sum().backward()
        rhos = {name: p for name, p in layer.named_parameters() if name.endswith("_rho")}
        assert set(rhos) == {f"{name}_rho" for name, _ in plain(**options).named_parameters()}, kind
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in rhos.values()), (kind, estimator)


@pytest.mark.parametrize("kind", KINDS)
def test_built_by_hand(kind: str) -> None:
    """Torch's initialisation, state dict plus rho, `eval()` output; rho follows a reset; a round trip of the state."""
    torch.manual_seed(0)
    layer = bnn.MultiheadAttention(8, 2, **KINDS[kind], dtype=torch.float64)
    torch.manual_seed(0)
    reference = nn.MultiheadAttention(8, 2, **KINDS[kind], dtype=torch.float64)
    state, plain_state = layer.state_dict(), reference.state_dict()
    assert set(state) == {name + end for name in plain_state for end in ("", "_rho")}
    assert all(torch.equal(state[name], value) for name, value in plain_state.items())
    given_inputs = inputs(layer)
    with torch.no_grad():
        assert torch.equal(layer.eval()(*given_inputs)[0], reference.eval()(*given_inputs)[0])
        assert not torch.equal(layer.train()(*given_inputs)[0], layer(*given_inputs)[0])
    other = bnn.MultiheadAttention(8, 2, **KINDS[kind], dtype=torch.float64)
    other.load_state_dict(state)
    with torch.no_grad(), fixed_draw(layer, 0), fixed_draw(other, 0):
        assert torch.equal(layer(*given_inputs)[0], other(*given_inputs)[0])
        other.out_proj.weight_rho.zero_()
    other.reset_parameters()
    torch.testing.assert_close(
        sigma(other.out_proj.weight_rho).mean() / other.out_proj.weight.abs().mean(),
        torch.tensor(0.05).double(),
        rtol=0.1,
        atol=0,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_bfloat16(estimator: str) -> None:
    layer: Any = to_bayesian(plain(batch_first=True), 0.1, estimator=estimator).to(torch.bfloat16).train()
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    output, weights = layer(x, x, x, attn_mask=mask)
    assert output.dtype == weights.dtype == torch.bfloat16 and layer.in_proj_weight_rho.dtype == torch.float32
    output.sum().backward()
    assert torch.isfinite(layer.in_proj_weight_rho.grad).all()


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [("packed", "reparameterization"), ("separate", "flipout"), ("extra keys", "local_reparameterization")],
)
def test_compiles_without_graph_breaks(kind: str, estimator: str) -> None:
    torch._dynamo.reset()
    layer: Any = to_bayesian(plain(**KINDS[kind]), 0.3, estimator=estimator).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given_inputs = inputs(layer)
    first, second = compiled(*given_inputs)[0], compiled(*given_inputs)[0]
    assert first.shape == second.shape and not torch.equal(first, second)
    first.sum().backward()
    assert layer.out_proj.weight_rho.grad.abs().sum() > 0
    with posterior_mean(layer), torch.no_grad():
        torch.testing.assert_close(compiled(*given_inputs)[0], layer(*given_inputs)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied: Any) -> None:
    layer: Any = to_bayesian(plain(add_bias_kv=True), 0.3)
    twin = copied(layer)
    given_inputs = inputs(layer)
    with torch.no_grad(), fixed_draw(layer, 0), fixed_draw(twin, 0):
        assert torch.equal(layer(*given_inputs)[0], twin(*given_inputs)[0])
    assert type(to_deterministic(twin).out_proj) is type(plain().out_proj)


def test_a_part_of_the_layer() -> None:
    """``out_proj`` alone, or all but it, is random."""
    given_inputs = inputs(plain())
    for options in ({"target_modules": ["out_proj"]}, {"exclude_modules": ["out_proj"]}):
        model: Any = nn.ModuleDict({"attention": plain()})
        to_bayesian(model, 0.3, **options)
        layer = model["attention"].eval()
        with torch.no_grad(), fixed_draw(model, 0):
            first = layer(*given_inputs)[0]
        with torch.no_grad(), fixed_draw(model, 1):
            second = layer(*given_inputs)[0]
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"attn_mask": torch.zeros(4, 4)}, ValueError, r"`attn_mask`.*\(4, 5\).*\(4, 4\)"),
        ({"key_padding_mask": torch.zeros(3, 4)}, ValueError, r"`key_padding_mask`.*\(3, 5\).*\(3, 4\)"),
        ({"is_causal": True}, ValueError, "`is_causal`.*`attn_mask=None`"),
        ({"attn_mask": torch.zeros(4, 5, dtype=torch.long)}, TypeError, "Boolean or floating point.*int64"),
    ],
)
def test_wrong_arguments(call: dict[str, Any], error: type[Exception], message: str) -> None:
    layer: Any = to_bayesian(plain(), 0.3, estimator="flipout").train()
    with pytest.raises(error, match=message):
        layer(*inputs(layer), **call)


def test_computed_weights_are_refused() -> None:
    layer = prune.l1_unstructured(plain(), "in_proj_weight", 0.5)
    assert "in_proj_weight is computed" in str(bnn.MultiheadAttention.refusal(layer))
