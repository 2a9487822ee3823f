"""A Bayesian layer's tensor is the draw wherever it is read: against a plain network at the drawn weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from bayeformers import fixed_draw, posterior_mean, to_bayesian
from bayeformers import nn as bnn
from bayeformers.nn.reading import only_describes

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SLOW = {"x": X, "slow": True}
FAST = {"x": X, "slow": False}


class TwoPaths(nn.Module):
    """One layer that is called on one path and read on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, slow: bool = False) -> Tensor:
        x = self.a(x)
        return self.b(x) if slow else x @ self.b.weight.T + self.b.bias


class ByAttribute(TwoPaths):
    """The weight's name as text, through a helper, and the table of an embedding read whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4, padding_idx=1)

    def forward(self, x: Tensor, slow: bool = False) -> Tensor:
        table = self.table(torch.arange(4)) if slow else self.table.weight
        return F.linear(self.a(x), *(getattr(self.b, name) for name in ("weight", "bias"))) @ table


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=2, groups=4)

    def forward(self, x: Tensor, slow: bool = False) -> Tensor:
        x = x.T[None]
        return self.conv(x) if slow else F.conv1d(x, self.conv.weight, self.conv.bias, padding=2, groups=4)


NETS: list[Callable[[], nn.Module]] = [TwoPaths, ByAttribute, Convolution]


def at_draw(plain: nn.Module, model: nn.Module, index: int) -> nn.Module:
    """``plain`` with the weights of a draw, taken tensor by tensor."""
    with torch.no_grad(), fixed_draw(model, index):
        for tensor in bnn.variational_tensors(model):
            plain.get_parameter(tensor.name).copy_(tensor.module.variational(tensor.parameter_name).sample())
    return plain


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("inputs", [SLOW, FAST])
def test_a_draw_is_one_network_on_every_path(kind: Callable[[], nn.Module], inputs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = kind().eval()
    model = to_bayesian(copy.deepcopy(plain), delta=0.5).eval()
    assert torch.equal(model(**inputs), plain(**inputs))
    for index in (0, 1):
        with fixed_draw(model, index):
            found = model(**inputs)
        torch.testing.assert_close(found, at_draw(copy.deepcopy(plain), model, index)(**inputs))


@pytest.mark.parametrize("kind", NETS)
def test_training_draws_are_the_same_on_every_path(kind: Callable[[], nn.Module]) -> None:
    """From the same random state; and rho has the same gradient, whichever way its tensor was used."""
    torch.manual_seed(0)
    model = to_bayesian(kind(), delta=0.5).train()
    results = []
    for inputs in (SLOW, FAST):
        torch.manual_seed(1)
        model.zero_grad()
        output = model(**inputs)
        output.square().sum().backward()
        results.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys() != set()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name])


def test_outside_a_forward_the_attribute_is_the_parameter() -> None:
    model = to_bayesian(TwoPaths())
    for module in (model.train(), model.eval()):
        assert module.b.weight is module.b._parameters["weight"] and isinstance(module.b.bias, nn.Parameter)
        with posterior_mean(model):
            assert module.b.weight is module.b._parameters["weight"]
    with fixed_draw(model, 0):
        assert model.b.get_parameter("weight") is model.b._parameters["weight"]
        assert torch.equal(model.state_dict()["b.weight"], model.b._parameters["weight"])


def test_what_is_read_under_a_draw_is_a_copy() -> None:
    """Who edits it in place changes neither the mean nor the draw."""
    model = to_bayesian(TwoPaths(), delta=0.5).eval()
    with torch.no_grad(), fixed_draw(model, 0):
        before, mean = model(X, slow=True), model.b.get_parameter("weight").clone()
        model.b.weight.zero_()
        assert torch.equal(model(X, slow=True), before) and torch.equal(model.b.get_parameter("weight"), mean)


def test_a_tensor_that_was_replaced_is_one_clear_error() -> None:
    model = to_bayesian(TwoPaths())
    parameter = model.b._parameters.pop("weight")  # as weight norm and pruning do
    with pytest.raises(RuntimeError, match=r"'b.weight' is no longer a Parameter.*before `to_bayesian`"):
        model.b.weight = parameter.data
    with pytest.raises(RuntimeError, match=r"'b.weight' is no longer a Parameter"):
        model.train()(X, slow=True)


class Describes(nn.Module):
    """Questions that mean and draw answer alike, and readings of the values between them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen: list[bool] = []

    def __getattribute__(self, name: str) -> Any:
        if name == "probe":
            self.seen.append(only_describes(sys._getframe(1)))
            return object.__getattribute__(self, "_parameters")["weight"]
        return super().__getattribute__(name)


def test_questions_about_a_tensor_are_told_from_its_values() -> None:
    net = Describes()
    # not within `assert`, of which pytest makes other code
    _ = net.probe.dtype == torch.float32 and net.probe.device.type == "cpu" and net.probe.shape == (2,)
    _ = isinstance(net.probe, torch.Tensor) and isinstance(net.probe, nn.Parameter)
    if net.probe is not None:
        net.seen.append(True)
    assert net.seen == [True] * 7
    net.seen.clear()
    _ = net.probe + 1, net.probe.T, torch.add(net.probe, 1), net.probe.data, F.linear(torch.ones(1, 2), net.probe)
    values = net.probe
    _ = [net.probe for _ in range(2)], max(net.probe), values
    assert net.seen == [False] * len(net.seen) and len(net.seen) == 9


@pytest.mark.parametrize("fullgraph", [True, False])
def test_reading_compiles(fullgraph: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = to_bayesian(ByAttribute(), delta=0.5).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))
        for index in (0, 1):
            with fixed_draw(model, index):
                torch.testing.assert_close(compiled(X), model(X))
                torch.testing.assert_close(compiled(X, slow=True), model(X, slow=True))
    torch._dynamo.reset()


def _falcon_mamba() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.FalconMambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4, expand=2, use_cache=False
    )
    return hf.FalconMambaForCausalLM(config), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def _jamba() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.JambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False, num_experts=2,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_cache=False,
    )  # fmt: skip
    return hf.JambaForCausalLM(config), {"input_ids": torch.tensor([[5, 6, 7, 8]])}


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    config = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    pixels = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return hf.CLIPVisionModel(config), {"pixel_values": pixels, "interpolate_pos_encoding": True}


@pytest.mark.parametrize("make", [_falcon_mamba, _jamba, _clip])
def test_architectures(make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    """dt_proj of state-space layers, position tables that are interpolated."""
    torch.manual_seed(0)
    plain, inputs = make()
    plain = plain.eval().float()
    model = to_bayesian(copy.deepcopy(plain), delta=0.3).eval()
    with torch.no_grad(), fixed_draw(model, 0):
        found = model(**inputs)[0]
    with torch.no_grad():
        torch.testing.assert_close(found, at_draw(plain, model, 0)(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_dtype_is_asked_for_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5's feed-forward layer looks at the dtype of its weight, and whether it is a tensor, in every forward."""
    config = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = to_bayesian(hf.T5EncoderModel(config)).train()
    drawn: list[str] = []
    value = bnn.Linear._value

    def counted(self: bnn.Linear, name: str) -> Tensor:
        drawn.append(self.specs[name].name)
        return value(self, name)

    monkeypatch.setattr(bnn.Linear, "_value", counted)
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert drawn == []


def test_a_weight_norm_from_before_reads_its_own_tensors() -> None:
    """Its norms and directions are random (wav2vec2's positions): a draw is the plain network with theirs."""
    plain = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).eval()
    model, x = to_bayesian(copy.deepcopy(plain), delta=0.3), torch.randn(5, 3)
    with torch.no_grad():
        mean = plain(x)
        with fixed_draw(model, 1):
            found = model(x)
            for tensor in bnn.variational_tensors(model):
                value = tensor.module.variational(tensor.parameter_name).sample()
                plain.get_parameter(tensor.name).copy_(value)
        torch.testing.assert_close(found, plain(x))
    assert not torch.equal(found, mean)
