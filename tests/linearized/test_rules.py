"""Rules of all layer classes: M = sum_t g_t a_t^T and its layout, against autograd Jacobians in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeformers import laplace
from bayeformers.laplace import fit
from bayeformers.linearized import TENSOR, LayerRule, gradients, record, register_rule, rule_of, supported_layers
from bayeformers.linearized import rules as module_of_rules
from bayeformers.linearized.kinds import AffineCaptured, Captured, GainCaptured, TableCaptured, TensorCaptured
from bayeformers.linearized.rules import ConvRule, ConvTransposeRule, EmbeddingRule, LinearRule, NormRule
from tests.laplace.networks import QUIET, classes, reader, text
from tests.laplace.reference import close, dense, ggn, in_matrix_form, integers, jacobian, normal

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), normal(2, 4)),
    "linear, positions": (lambda: nn.Linear(4, 3), normal(2, 5, 4)),
    "linear, plane": (lambda: nn.Linear(4, 3), normal(2, 3, 2, 4)),
    "Conv1D": (lambda: Conv1D(3, 4), normal(2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), normal(2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 0)), normal(2, 3, 5, 4)),
    "conv2d, same": (lambda: nn.Conv2d(2, 4, 3, padding="same", groups=2, padding_mode="reflect"), normal(2, 2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 2, padding=(0, 1, 0), padding_mode="circular"), normal(2, 2, 2, 3, 2)),
    "conv1d, transposed": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, dilation=2, groups=2),
        normal(2, 4, 3),
    ),
    "conv2d, transposed": (lambda: nn.ConvTranspose2d(2, 3, (1, 2), stride=(2, 1), padding=(0, 2)), normal(2, 2, 2, 5)),
    "conv3d, transposed": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), groups=2), normal(2, 2, 1, 2, 2)),
    "embedding": (lambda: nn.Embedding(5, 3), integers(5, 2, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(4), normal(2, 3, 4)),
    "LayerNorm, plane": (lambda: nn.LayerNorm((2, 4)), normal(2, 3, 2, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), normal(2, 3, 4)),
    "T5": (lambda: hf.models.t5.modeling_t5.T5LayerNorm(4), normal(2, 3, 4)),
    "Llama": (lambda: hf.models.llama.modeling_llama.LlamaRMSNorm(4), normal(2, 3, 4)),
    "Gemma": (lambda: hf.models.gemma.modeling_gemma.GemmaRMSNorm(4), normal(2, 3, 4)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


class Readout(nn.Module):
    """Two fixed nonlinear readings of a layer's output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).flatten(1)
        weights = normal(h.shape[1], 2, seed=6)
        return (h + 0.3 * h.square()) @ weights


def network(name: str) -> tuple[nn.Module, Tensor, LayerRule]:
    build, x = LAYERS[name]
    model = Readout(build()).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=20 + number))
    rule = rule_of(model.layer)
    assert rule is not None
    return model, x, rule


@each_layer
def test_jacobians_are_those_of_autograd(name: str) -> None:
    """M, (K, B, d_out, d_in), and for a bias sum_t g_t."""
    model, x, rule = network(name)
    layer: Any = model.layer
    outputs, (use,) = record(model, x, [layer], lambda output: output)
    expected = jacobian(model, "layer", x)
    for c in range(2):
        column = torch.zeros_like(outputs)
        column[:, c] = 1
        (gradient,) = gradients(outputs, [use], column)
        a, g = use.inputs(2), use.gradients(gradient, 2)
        if isinstance(rule, EmbeddingRule):
            a, g = g, nn.functional.one_hot(a, 5).double()  # rows of a table are outputs
        if isinstance(rule, NormRule):
            parts = [(g * a).sum(2), g.sum(2)][: len(list(layer.parameters()))]
            found = torch.stack(parts, dim=2)
        else:
            if getattr(layer, "bias", None) is not None:
                a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
            found = g.mT @ a
        for b in range(2):
            close(found[:, b], expected[b][c], 1e-6 if name == "Gemma" else 1e-12)  # it normalises in float32


@each_layer
def test_layout_of_the_matrix(name: str) -> None:
    """`matrix` is the reference's layout, and `weight` its inverse."""
    model, _, rule = network(name)
    weight = model.layer.weight.detach()
    matrix = rule.matrix(model.layer, weight)
    assert torch.equal(matrix, in_matrix_form(model.layer, {"weight": weight[None]})[0])
    assert torch.equal(rule.weight(model.layer, matrix), weight)


def test_rules_by_class() -> None:
    kinds: dict[nn.Module, type[LayerRule]] = {
        nn.Linear(2, 2): LinearRule,
        nn.Conv3d(1, 1, 1): ConvRule,
        nn.ConvTranspose1d(1, 1, 1): ConvTransposeRule,
        nn.Embedding(2, 2): EmbeddingRule,
        nn.LayerNorm(2): NormRule,
        nn.RMSNorm(2): NormRule,
    }
    for module, expected in kinds.items():
        assert type(rule_of(module)) is expected
    for other in (nn.BatchNorm1d(2), nn.GroupNorm(1, 2), nn.EmbeddingBag(2, 2), nn.Tanh()):
        assert rule_of(other) is None
    known = {"Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "LayerNorm", "Linear", "RMSNorm of any model"}
    assert known <= set(supported_layers().split(", "))


def test_a_layer_is_of_one_kind() -> None:
    """Its rule says once what its Jacobian is made of."""
    kinds: dict[nn.Module, type[Captured]] = {
        nn.Linear(2, 2): AffineCaptured,
        Conv1D(2, 2): AffineCaptured,
        nn.ConvTranspose2d(1, 1, 1): AffineCaptured,
        nn.Embedding(2, 2): TableCaptured,
        nn.RMSNorm(2): GainCaptured,
    }
    for module, expected in kinds.items():
        rule = rule_of(module)
        assert rule is not None and rule.kind is expected and rule.is_affine is (expected is AffineCaptured)
    assert TENSOR.kind is TensorCaptured
    # the flag alone, as rules had it, would give such a layer the Jacobian of an affine one
    flagged = type("Flagged", (LinearRule,), {"is_affine": False})
    with pytest.raises(TypeError, match="Flagged: name the `kind`"):
        register_rule(nn.Tanh)(flagged)


def test_another_output_size_has_no_rule() -> None:
    """The rule sees the layer's arguments, not those of the call; a size that they give is fine."""

    class Sized(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size, self.layer = size, nn.ConvTranspose1d(1, 1, 2, stride=3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x, output_size=[self.size])
            return output.flatten(1)

    for size in (8, 9):
        model = Sized(size).double()
        outputs, (use,) = record(model, normal(2, 1, 3), [model.layer], lambda output: output)
        (gradient,) = gradients(outputs, [use], torch.ones_like(outputs))
        if size == 8:
            assert use.gradients(gradient, 2).shape[2] == use.inputs(2).shape[2]
        else:
            with pytest.raises(ValueError, match="no rule for the Jacobian of ConvTranspose1d.*`output_size`"):
                use.gradients(gradient, 2)


def test_a_norm_of_another_form_has_no_rule() -> None:
    """A name is not enough: one vector of gains, and an output that is affine in it."""

    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.extra = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.extra

    assert rule_of(OddRMSNorm()) is None


def test_forwards_of_their_own() -> None:
    class Same(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    assert isinstance(rule_of(Same(2, 2)), LinearRule) and rule_of(Other(2, 2)) is None
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert rule_of(patched) is None
    with pytest.raises(ValueError, match="no rule for the Jacobian of Other; see `register_rule`"):
        record(Other(2, 2), normal(1, 2).float(), [Other(2, 2)], lambda output: output)


@pytest.fixture
def registry() -> Iterator[None]:
    """The rules come back as they were."""
    kept = dict(module_of_rules._RULES)
    yield
    module_of_rules._RULES.clear()
    module_of_rules._RULES.update(kept)


@pytest.mark.usefixtures("registry")
def test_a_rule_of_ones_own_is_used_by_fit() -> None:
    class Tripled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    @register_rule(Tripled)
    class TripledRule(LinearRule):
        def gradients(self, module: nn.Linear, gradient: Tensor) -> Tensor:
            return 3 * super().gradients(module, gradient)

    model = Tripled(4, 3).double()
    x, y = normal(5, 4), classes(5)
    posterior = fit(model, [(x, y)], prior_precision=1.0, curvature="dense", **QUIET)
    close(dense(posterior.layers[""]), ggn(model, "", x, y), 1e-12)
    assert "Tripled" in supported_layers()
    assert register_rule is laplace.register_rule is laplace.register_curvature


# ------------------------------------------------------------------------------------------------------------ recording


def test_recording_leaves_the_model_as_it_was() -> None:
    model, inputs = reader(), text()
    layers = [model.query, model.head]
    model.query.weight.requires_grad_(False)
    with torch.no_grad():
        outputs, uses = record(model, inputs, layers, lambda output: output.logits)
    assert [use.module for use in uses] == layers
    assert outputs.requires_grad
    assert not any(module._forward_hooks for module in model.modules())
    assert [p.requires_grad for p in model.query.parameters()] == [False, True]
    with pytest.raises(RuntimeError, match="inside"):
        record(model, inputs, layers, _raise)
    assert not any(module._forward_hooks for module in model.modules())
    assert [p.requires_grad for p in model.query.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def _raise(output: Any) -> Tensor:
    raise RuntimeError("inside")


def test_inputs_that_are_edited_in_place_are_kept() -> None:
    """ReLU(inplace=True) behind a layer that keeps its input."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            f: Tensor = self.second(h)
            h.mul_(0)
            return f.relu_() + h[:, :2]

    model, x = InPlace().double(), normal(3, 4)
    _, (_, use) = record(model, x, [model.first, model.second], lambda output: output)
    torch.testing.assert_close(use.input, torch.tanh(model.first(x)).detach())


def test_gradients_at_outputs_that_are_edited_in_place() -> None:
    """Whole, by a view and by a slice, of the first layer and of a later one: those of the same network out of place.

    An output is not kept: the gradient is asked for at its place in the graph, which no edit moves.
    """
    first, second, third = (nn.Linear(4, 4).double() for _ in range(3))

    class Edited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = first, second, third

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.mul_(2).relu_()
            f = self.second(h)
            f.view(-1, 2, 2).mul_(2)
            f[:, :2] *= 3
            return self.third(f).mul_(x)  # type: ignore[no-any-return]

    x, weights = normal(3, 4), normal(3, 4, seed=1)
    outputs, uses = record(Edited(), x, [first, second, third], lambda output: output)
    found = gradients(outputs, uses, weights)
    one = first(x)
    two = second((2 * one).relu())
    three = third(2 * two * torch.tensor([3.0, 3, 1, 1]))
    close(outputs, three * x, 1e-12)
    for grad, expected in zip(found, torch.autograd.grad(three * x, (one, two, three), weights), strict=True):
        close(grad, expected, 1e-12)


def test_a_layer_without_effect_has_no_gradient() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.silent = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.silent(x)
            return self.used(x)  # type: ignore[no-any-return]

    model, x = Silent().double(), normal(3, 4)
    outputs, uses = record(model, x, [model.used, model.silent], lambda output: output)
    found = gradients(outputs, uses, torch.ones_like(outputs))
    of = {use.module: gradient for use, gradient in zip(uses, found, strict=True)}
    assert float(of[model.silent].abs().max()) == 0 and float(of[model.used].min()) == 1
    assert gradients(outputs, [], torch.ones_like(outputs)) == []
