"""Which layers are covered, and why others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from bayeformers.laplace.targets import choose_targets
from tests.laplace.networks import classes, fitted, mlp, reader, text
from tests.laplace.reference import normal


class Doubling(nn.Linear):
    """Uses its weight twice over."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Only its name is new."""


class Scaled(nn.Linear):
    """One more Parameter in its own forward's stead."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.ones(4))


def names(model: nn.Module, **options: object) -> list[str]:
    return [target.name for target in choose_targets(model, **options)[0]]  # type: ignore[arg-type]


def test_default_layers() -> None:
    """Tables and normalisations are off unless named."""
    found, skipped = choose_targets(reader())
    assert [target.name for target in found] == ["query", "key", "value", "head"]
    assert skipped == {
        "table": "Embedding is off by default: name it in target_modules",
        "norm": "LayerNorm is off by default: name it in target_modules",
    }
    assert names(reader(), target="all") == ["query", "key", "value", "head"]
    assert names(reader(), target=".*") == ["table", "query", "key", "value", "norm", "head"]
    assert names(reader(), target=["norm", "table"], exclude=["table"]) == ["norm"]


def test_a_layer_as_a_target() -> None:
    (first, second), _ = choose_targets(mlp())
    assert (first.num_weights, first.matrix_shape, second.matrix_shape) == (25, (1, 5, 5), (1, 3, 6))
    weights = torch.cat([p.detach().flatten() for p in first.parameters.values()])
    assert first.squared_norm == pytest.approx(float(weights @ weights))


def test_containers_are_excluded_with_what_they_hold() -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 2))
    found, skipped = choose_targets(model, exclude=["0"])
    assert [target.name for target in found] == ["1"]
    assert skipped == {"0.0": "in exclude_modules", "0.2": "in exclude_modules"}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Doubling(4, 4), "no rule for Doubling"),
        (lambda: nn.Bilinear(2, 2, 2), "no rule for Bilinear"),
        (lambda: nn.BatchNorm1d(4), "no rule for BatchNorm1d"),
        (lambda: nn.Linear(4, 4).requires_grad_(False), r"frozen (requires_grad is False)"),
        (Scaled, "it has parameters besides weight and bias: ['bias', 'gain', 'weight']"),
        (lambda: nn.LayerNorm(4), "LayerNorm is off by default: name it in target_modules"),
    ],
)
def test_reasons(layer: Callable[[], nn.Module], reason: str) -> None:
    found, skipped = choose_targets(nn.Sequential(nn.Linear(4, 4), layer()))
    assert [target.name for target in found] == ["0"]
    assert skipped == {"1": reason}


def test_a_forward_of_its_own() -> None:
    """A subclass with torch's forward is covered; one instance whose forward was replaced is not."""
    model = nn.Sequential(Named(4, 4), nn.Linear(4, 4))
    assert names(model) == ["0", "1"]
    model[1].forward = lambda x: x @ model[1].weight
    assert choose_targets(model)[1] == {"1": "no rule for Linear"}


def test_frozen_parts_are_fixed() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    posterior = fitted(model, normal(6, 4), classes(6))
    assert [list(target.parameters) for target in posterior.targets] == [["bias"], ["weight"]]
    before = [p.detach().clone() for p in model.parameters()]
    with posterior.draw(0):
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False]


def test_layers_that_share_their_parameters_are_one_target() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    (first, second), skipped = choose_targets(model)
    assert first.modules == (model["a"], model["b"]) and second.modules == (model["c"],)
    assert skipped == {}


@pytest.mark.parametrize("half", ["weight", "bias"])
def test_layers_that_share_half_of_them_are_left_out(half: str) -> None:
    """One tensor in two layers whose other parameters differ has no Kronecker block."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    setattr(model["b"], half, getattr(model["a"], half))
    found, skipped = choose_targets(model)
    assert [target.name for target in found] == ["c"]
    assert set(skipped) == {"a", "b"}
    assert all(reason.startswith("tied to") for reason in skipped.values())


def test_a_tied_head_stays_deterministic() -> None:
    config = hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1, n_positions=6)
    model = hf.GPT2LMHeadModel(config)
    for target in (None, ".*"):
        found, skipped = choose_targets(model, target)
        reason = skipped["lm_head"]
        assert reason == "tied to a layer that uses the weight in another way (Embedding)"
        assert not {"lm_head", "transformer.wte"} & {t.name for t in found}
    assert skipped["transformer.wte"] == "tied to a layer that uses the weight in another way (Linear)"
    assert "transformer.h.0.attn.c_attn" in {t.name for t in found}


def test_sharing_with_an_excluded_layer() -> None:
    """The shared tensor would move the excluded layer too."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    found, skipped = choose_targets(model, exclude=["b"])
    assert [target.name for target in found] == ["c"]
    assert skipped == {"a": "tied to a layer in exclude_modules", "b": "in exclude_modules"}


def test_sharing_with_a_layer_that_is_not_targeted() -> None:
    """It would be random too, though it was not named: refused, as `to_bayesian` does."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias
    for one, other in ("ab", "ba"):
        with pytest.raises(ValueError, match=f"'{other}' shares its weight with '{one}' .*not in target_modules"):
            choose_targets(model, [one])
    assert names(model, target=["a", "b"]) == ["a"]
    assert names(model, target=["c"]) == ["c"]


def test_layers_that_are_never_called() -> None:
    model = reader()
    model.spare = nn.Linear(2, 2).double()
    posterior = fitted(model, text(), classes(6))
    assert "spare" not in posterior.layers
    assert posterior.record.skipped["spare"] == "the model does not call it"
    with pytest.raises(ValueError, match="calls none of the layers"):
        fitted(model, text(), classes(6), target_modules=["spare"])


def test_the_last_layer_is_the_one_called_last() -> None:
    """Not the one that stands last."""
    model = reader()
    model.spare = nn.Linear(2, 2).double()
    head = model.head
    del model.head
    modules = dict(model.named_children())
    for name in modules:
        delattr(model, name)
    model.head = head
    for name, module in modules.items():
        setattr(model, name, module)
    assert list(fitted(model, text(), classes(6), subset="last_layer").layers) == ["head"]


def test_nothing_left() -> None:
    with pytest.raises(ValueError, match=r"leaves no layer .*\(no layer with weights\). Supported: Conv"):
        choose_targets(nn.Tanh())
    with pytest.raises(ValueError, match="no rule for BatchNorm1d"):
        choose_targets(nn.BatchNorm1d(3))
