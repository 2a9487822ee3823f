"""Bare weights: whoever reads them in a forward sees the draw, everyone else the Parameter.

References: the plain module called with mu + sigma * eps (`torch.func.functional_call`), eps from `tests/reference.py`.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bayeformers
from bayeformers import (
    NormalPrior,
    fixed_draw,
    kl_divergence,
    posterior_mean,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers import nn as bnn
from bayeformers.nn.parameters import RandomParameters, random_names
from tests.reference import gradients, noise_of, run_with, sigma, sigma_slope

NAMES = frozenset({"experts.up", "experts.down", "token"})
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Fused weights, each read once per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, *, rows: int = 1) -> Tensor:
        parts = [torch.tanh(x @ self.up[i]) @ self.down[i] for i in range(3)]
        return self.gain * sum(parts, torch.zeros(()))


class Net(nn.Module):
    """A token of the root's own, fused experts, and a table that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.experts, self.table, self.head = Experts(), nn.Embedding(5, 4, padding_idx=1), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.experts(input + self.token) + self.table.weight)


LAYERS = {"table": "Embedding", "head": "Linear"}


def net(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return to_bayesian(Net(), **{"delta": 0.4, "freeze": False, **options})


def plain() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def drawn(model: nn.Module, index: int, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a draw from the reference noise."""
    noise = noise_of(plain(), LAYERS, index, seed, NAMES)
    scales = {name: sigma(model.get_parameter(f"{name}_rho")) for name in noise}
    return {name: (model.get_parameter(name) + scales[name] * eps).float() for name, eps in noise.items()}


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_which_tensors() -> None:
    """Matrices of any module, and all of a layer that is only read; a vector of a module without a rule is not."""
    model = net()
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, RandomParameters)}
    assert kinds == {"": "Net", "experts": "Experts", "table": "Embedding"}
    assert {t.name for t in bnn.variational_tensors(model)} == {*NAMES, "table.weight", "head.weight", "head.bias"}
    assert summary(model).skipped == {"experts.gain": "not a matrix, of a module without a rule for it"}
    assert summary(model).matrix_coverage == 1.0 and "100.0%" in str(summary(model))
    assert isinstance(model, Net) and inspect.signature(model.experts.forward) == inspect.signature(Experts().forward)


@pytest.mark.parametrize("mode", [True, False])
def test_a_held_draw_is_the_reference_network(mode: bool) -> None:
    model = net().train(mode)
    for index, seed in ((0, 0), (3, 8)):
        expected = run_with(plain(), drawn(model, index, seed), {"input": X})
        with fixed_draw(model, index, seed):
            torch.testing.assert_close(model(X), expected)
            with torch.no_grad():
                torch.testing.assert_close(model(X), expected)
                assert model.experts.up is model.experts.up  # made once
            with posterior_mean(model):
                assert torch.equal(model(X), plain()(X))


def test_gradients() -> None:
    """Each tensor's rho and mean, float64, read three times in a forward: d sigma / d rho * eps * dL/dw, and dL/dw."""
    model, original = net().double(), plain().double()
    noise = noise_of(original, LAYERS, 2, bare=NAMES)
    weights = {n: original.get_parameter(n) + sigma(model.get_parameter(f"{n}_rho")) * e for n, e in noise.items()}
    by_weight = gradients(lambda w: run_with(original, w, {"input": X.double()}).square().sum(), weights)
    with fixed_draw(model, 2):
        model(X.double()).square().sum().backward()
    for name, eps in noise.items():
        rho, mean = model.get_parameter(f"{name}_rho"), model.get_parameter(name)
        torch.testing.assert_close(mean.grad, by_weight[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rho.grad, (by_weight[name] * eps * sigma_slope(rho)).float(), rtol=1e-5, atol=1e-5)


def test_one_draw_per_forward() -> None:
    """In `train()` all readings of one forward agree, wherever they are made; the next forward draws anew."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(4, 4)), Inner()
            self.inner.weight = self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) - x @ self.weight - x @ self.inner.weight + x @ self.weight

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = to_bayesian(Twice(), delta=0.5).train()
    assert [t.name for t in bnn.variational_tensors(model)] == ["weight"]
    assert model(X).abs().max() < 1e-5
    model = net().train()
    assert not torch.equal(model(X), model(X))


def test_local_and_flipout_models_sample_bare_tensors() -> None:
    """No operation is known, so the estimator of a bare tensor is plain sampling."""
    for estimator in ("flipout", "local_reparameterization"):
        model = net(estimator=estimator)
        assert model.experts.estimator.name == "reparameterization" and model.head.estimator.name == estimator
        model.train()(X).sum().backward()
        assert model.experts.up_rho.grad is not None and model.table.weight_rho.grad is not None


def test_padding_row_and_kl() -> None:
    """A table that is only read keeps its padding row free of noise; a frozen relative prior starts at KL 0."""
    model = net(freeze=True)
    with fixed_draw(model, 0):
        assert torch.equal(model.table.weight[1], model.table._parameters["weight"][1])
        assert not torch.equal(model.table.weight[0], model.table._parameters["weight"][0])
    assert float(kl_divergence(model).detach()) == pytest.approx(0.0, abs=1e-4)
    wide = net(prior=NormalPrior(0.5, 0.0))
    q = torch.distributions.Normal(wide.experts.up, sigma(wide.experts.up_rho).float())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 0.5)).sum()
    found = {t.name: t.kl for t in summary(wide).tensors}["experts.up"]
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ what is not


def test_outside_a_forward_it_is_the_parameter() -> None:
    """Initialisation, optimizers and checkpoints see the mean, in `train()` too."""
    model = net().train()
    model(X)
    up = model.experts._parameters["up"]
    assert model.experts.up is up is model.get_parameter("experts.up") is dict(model.named_parameters())["experts.up"]
    with fixed_draw(model, 0):
        assert model.experts.up is not up and model.experts.get_parameter("up") is up
        assert model.state_dict()["experts.up"].data_ptr() == up.data_ptr()
    with posterior_mean(model):
        assert model.experts.up is up
    model.experts.up = nn.Parameter(torch.zeros(3, 4, 6))
    assert model.experts.up.abs().sum() == 0 and model.experts.up is model.experts._parameters["up"]
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = model.experts.missing


def test_a_part_called_by_itself_has_one_draw() -> None:
    """The module that holds the tensors may be called without the model around it."""
    part = net().experts.train()
    assert not torch.equal(part(X), part(X))
    part.eval()
    assert torch.equal(part(X), plain().experts(X))


def test_an_error_while_drawing_is_not_the_mean() -> None:
    model = net()
    model.experts.up_rho = nn.Parameter(torch.zeros(3, 4, 5))
    with fixed_draw(model, 0), pytest.raises(RuntimeError, match="resized"):
        model(X)
    del model.experts.up_rho
    with fixed_draw(model, 0), pytest.raises(RuntimeError, match="`up` of Experts could not be drawn"):
        model(X)


class ByList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def weights(self) -> list[Tensor]:
        return list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights()[0]


class OnlyDtype(ByList):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(next(self.parameters()).dtype) @ self.weight


class Clash(ByList):
    def __init__(self) -> None:
        super().__init__()
        self.prior = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.prior(x) @ self.weight


def test_what_is_refused() -> None:
    """Where the attribute is not what the forward reads, or cannot carry the state: deterministic, with the reason."""
    model = nn.ModuleDict({"list": ByList(), "dtype": OnlyDtype(), "clash": Clash(), "rnn": nn.RNN(4, 4)})
    model["norm"], model["whole"] = nn.LayerNorm((3, 4)), nn.Linear(4, 4)
    found = summary(to_bayesian(model)).skipped
    assert isinstance(model["dtype"], RandomParameters)
    assert found["list"] == "the forward of ByList takes its parameters otherwise than by attribute"
    assert found["clash"] == "Clash has an attribute 'prior', which a Bayesian layer needs for itself"
    assert found["rnn"] == "RNN is not a supported layer"
    assert set(found) == {"list", "clash", "rnn", "norm"} and isinstance(model["clash"].prior, bnn.Linear)
    assert random_names(nn.LSTM(2, 2)) == () == random_names(nn.LayerNorm((3, 4)))


class Sliced(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return self.weight[: input.shape[1]]


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(), self.bias)


def test_subclasses_with_a_forward_of_their_own() -> None:
    """What bypasses `super().forward` reads the weight, and so the draw; its bias too."""
    for layer, x in ((Sliced(6, 3), torch.zeros(2, 4)), (Standardised(4, 3), X)):
        model = to_bayesian(nn.Sequential(layer), delta=0.5)
        original = to_deterministic(copy.deepcopy(model))
        assert isinstance(model[0], RandomParameters)
        kind = {"0": "Embedding" if isinstance(layer, Sliced) else "Linear"}
        noise = noise_of(original, kind, 1)
        weights = {n: original.get_parameter(n) + 0.5 * original.get_parameter(n).abs() * e for n, e in noise.items()}
        with torch.no_grad():
            for name in noise:  # without the floor of small weights
                model.get_parameter(f"{name}_rho").copy_(
                    torch.log(torch.expm1(0.5 * original.get_parameter(name).abs()))
                )
        with fixed_draw(model, 1):
            found, expected = model(x), torch.func.functional_call(original, weights, (x,))
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)


def test_parameter_lists() -> None:
    """`nn.ParameterList` and `nn.ParameterDict` read their tensors by attribute too."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
            self.named = nn.ParameterDict({"out": torch.randn(4, 2)})

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.items:
                x = x @ weight
            return x @ self.named["out"]

    model = to_bayesian(Listed(), delta=0.3).train()
    model(X).sum().backward()
    assert {t.name for t in bnn.variational_tensors(model)} == {"items.0", "items.1", "named.out"}
    assert all(t.rho.grad is not None for t in bnn.variational_tensors(model))


# ------------------------------------------------------------------------------------------------------------- ties


class Tied(nn.Module):
    """A matrix under a Linear and under a bare name; a head's bias has a second name without a use."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 4, padding_idx=0), Bare()
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


def test_ties() -> None:
    """One rho, one draw, the padding row of the table: in each use."""
    model = to_bayesian(Tied(), delta=0.5, freeze=False)
    assert model.head.weight_rho is model.table.weight_rho
    assert [t.name for t in bnn.variational_tensors(model)] == ["table.weight"]
    assert model.head.specs["weight"] == model.table.specs["weight"]
    original, ids = to_deterministic(copy.deepcopy(model)), torch.tensor([[0, 1, 2, 3]])
    eps = noise_of(original, {"table": "Embedding"}, 4)["table.weight"]
    weight = (original.table.weight + sigma(model.table.weight_rho) * eps).float()
    expected = run_with(original, {"table.weight": weight}, {"ids": ids})
    with fixed_draw(model, 4):
        torch.testing.assert_close(model(ids), expected)
        assert torch.equal(model.head.weight[0], model.table._parameters["weight"][0])
    for alone in (["table"], ["head"]):
        with pytest.raises(ValueError, match="a tied weight is Bayesian in all its uses or in none"):
            to_bayesian(Tied(), target_modules=alone)


# ------------------------------------------------------------------------------------------------------ life after


def test_there_and_back() -> None:
    model = net()
    assert type(model) is not Net
    to_deterministic(model)
    assert {type(m) for m in model.modules()} == {Net, Experts, nn.Embedding, nn.Linear}
    assert set(vars(model.experts)) == set(vars(Experts())) and set(dict(model.named_parameters())) == set(
        dict(plain().named_parameters())
    )
    assert torch.equal(model(X), plain()(X))


def test_unfreeze_stores_the_centre() -> None:
    model = net(freeze=True)
    assert not model.experts.up.requires_grad and model.experts.up_rho.requires_grad
    unfreeze(model)
    assert model.experts.up.requires_grad and torch.equal(model.experts.up_prior_centre, model.experts.up)


def test_copies() -> None:
    """deepcopy and pickle: same class, same draws, nothing shared, and both go back."""
    model = net()
    with fixed_draw(model, 2):
        expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and type(other.experts) is type(model.experts)
        with fixed_draw(other, 2):
            assert torch.equal(other(X), expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        assert type(to_deterministic(other)) is Net


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    """What is recomputed in backward finds its draw, inside the model's forward and as a part by itself."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    x = X.clone().requires_grad_()
    for part in (False, True):
        found = []
        for wrap in (nn.Sequential, Checkpointed):
            model = net().train()
            model = model.experts if part else model
            torch.manual_seed(3)
            wrap(model)(x).square().sum().backward()
            found.append({name: p.grad for name, p in model.named_parameters()})
        assert found[0]["up_rho" if part else "experts.up_rho"] is not None
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, rtol=0, atol=0)


def test_checkpointed_parts_of_a_model_share_its_draw() -> None:
    """A block that is recomputed, and a table that the owner reads in the recomputed part."""

    class Outer(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.on, self.table, self.experts = on, nn.Embedding(5, 4), Experts()

        def part(self, x: Tensor) -> Tensor:
            return self.experts(x) * self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.table.weight
            return checkpoint(self.part, x, use_reentrant=False) if self.on else self.part(x)

    found = []
    for on in (False, True):
        model = to_bayesian(Outer(on), delta=0.4, freeze=False).train()
        torch.manual_seed(3)
        model(X.clone().requires_grad_()).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_compiles() -> None:
    """Training compiles without graph breaks and reads fresh draws; a held draw is the same as without the compiler."""
    model = net().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, second = compiled(X), compiled(X)
    assert not torch.equal(first, second)
    second.sum().backward()
    assert all(t.rho.grad is not None and t.rho.grad.abs().sum() > 0 for t in bnn.variational_tensors(model))
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager")
    torch.testing.assert_close(compiled(X), plain()(X))
    for index in (0, 1):
        expected = run_with(plain(), drawn(model, index), {"input": X})
        with fixed_draw(model, index):
            torch.testing.assert_close(compiled(X), expected)
    torch._dynamo.reset()


def test_training_draws_have_the_right_moments() -> None:
    """Mean and variance of a read tensor over 4,000 training forwards, within 5 standard errors (24 values: < 1e-4)."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    model, n = to_bayesian(Read(), delta=0.5).train(), 4000
    with torch.no_grad():
        values = torch.stack([model(X) for _ in range(n)]).double()
    mean, scale = model._parameters["weight"].detach(), sigma(model.weight_rho)
    assert ((values.mean(0) - mean).abs() < 5 * scale / n**0.5).all()
    assert ((values.var(0) / scale.square() - 1).abs() < 5 * (2 / n) ** 0.5).all()


# ------------------------------------------------------------------------------------------------------ prediction


def test_reload_of_a_model_whose_root_has_bare_tensors(tmp_path: Path) -> None:
    """XLNet's mask embedding is the root's: class, draws, the way back, and scales that stay float32."""
    config = hf.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)
    model, ids = to_bayesian(hf.XLNetModel(config), delta=0.2).eval(), {"input_ids": torch.tensor([[5, 6, 7]])}
    model.save_pretrained(tmp_path)
    other = bayeformers.from_pretrained(tmp_path)
    assert isinstance(other, RandomParameters) and type(other).torch_class is hf.XLNetModel
    with torch.no_grad(), fixed_draw(model, 1), fixed_draw(other, 1):
        assert torch.equal(model(**ids).last_hidden_state, other(**ids).last_hidden_state)
    assert type(to_deterministic(other)) is hf.XLNetModel
    plainly = hf.XLNetModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(plainly(**ids).last_hidden_state, model(**ids).last_hidden_state)
    half = bayeformers.from_pretrained(tmp_path, dtype="bfloat16")
    assert {p.dtype for n, p in half.named_parameters() if n.endswith("_rho")} == {torch.float32}


def test_values_that_are_kept_between_calls() -> None:
    """A module that caches what it made of its weights would serve the first draw for ever: left alone, and said so."""

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.biases = nn.Parameter(torch.ones(2, 3))
            self.attention_bias_cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention_bias_cache.setdefault("cpu", self.biases.sum(0))

    model = to_bayesian(nn.Sequential(Cached(), nn.Linear(3, 2)))
    assert "between calls, in `attention_bias_cache`" in summary(model).skipped["0"]
