"""What conversion and reloading keep of a model: each property against the way in which it was lost elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import bayeformers
import bayeformers.nn as bnn
from bayeformers import fixed_draw, posterior_mean, to_bayesian
from tests.cases import case
from tests.training import tiny

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def converted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnn.BayesianModule)}


def by_class_name(model: nn.Module) -> nn.Module:
    """A converter by substrings of class names, which builds a Linear of its own in the place of what it takes."""
    for name, child in model.named_children():
        if "Linear" in type(child).__name__:
            fresh = bnn.Linear(child.in_features, child.out_features, bias=bool(child.bias is not None))
            with torch.no_grad():
                fresh.weight.copy_(child.weight)
                fresh.bias.copy_(child.bias)
            setattr(model, name, fresh)
        elif "Conv" in type(child).__name__:
            raise NotImplementedError(type(child).__name__)
        else:
            by_class_name(child)
    return model


# --------------------------------------------------------------------------------------------------- what is converted


@pytest.mark.protects("tied_weights")
def test_tied_weights() -> None:
    """Embedding and decoder are one tensor with one draw; converted each on its own, they come apart."""

    def check(model: nn.Module) -> None:
        with fixed_draw(model, 0):
            table, decoder = (model.get_submodule(name).variational("weight").sample() for name in ("table", "decoder"))
        assert torch.equal(table, decoder)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.decoder = nn.Embedding(6, 3), nn.Linear(3, 6)
            self.decoder.weight = self.table.weight

    check(to_bayesian(Tied()))
    apart = Tied()
    apart.decoder.weight = nn.Parameter(apart.table.weight.detach().clone())
    with pytest.raises(AssertionError):
        check(to_bayesian(apart))


@pytest.mark.protects("subclass_layers")
def test_subclass_layers() -> None:
    """Tables and GPT-2's projections are Bayesian too: by far the most of its weights; exact `nn.Linear` are few."""
    model = case("gpt2-lm").build()
    total = sum(parameter.numel() for parameter in model.parameters())

    def check(covered: int) -> None:
        assert covered / total > 0.95

    linear = {id(m.weight): m.weight.numel() for m in model.modules() if type(m) is nn.Linear}
    check(bayeformers.summary(to_bayesian(model)).bayesian_parameters)
    with pytest.raises(AssertionError):
        check(sum(linear.values()))


class Residual(nn.Linear):
    """A Linear by its class, not by what it computes."""

    def forward(self, input: Tensor) -> Tensor:
        return input + torch.tanh(torch.nn.functional.linear(input, self.weight, self.bias))


@pytest.mark.protects("conversion_by_class")
@pytest.mark.parametrize(
    ("kind", "dtype"), [(nn.Linear, torch.float64), (nn.Linear, torch.float32), (Residual, None), (Conv1D, None)]
)
def test_conversion_by_class(kind: Callable[[int, int], nn.Module], dtype: torch.dtype | None) -> None:
    """By exact class, the same Parameters: function at the mean, dtype and flags stay, whatever layers a model has."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), kind(4, 4)).to(dtype)
    original[0].weight.requires_grad_(False)

    def check(convert: Callable[[nn.Module], nn.Module]) -> None:
        model, x = convert(copy.deepcopy(original).eval()), X.to(dtype)
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=0)
        assert not any(module.training for module in model.modules())
        for name, parameter in original.named_parameters():
            assert model.get_parameter(name).requires_grad == parameter.requires_grad

    check(lambda model: to_bayesian(model, freeze=False))
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        check(by_class_name)


@pytest.mark.protects("conversion_by_class")
def test_conversion_is_atomic() -> None:
    """A conversion that fails leaves the model as it was; one that converts as it goes leaves half of it."""

    def check(convert: Callable[[nn.Module], nn.Module]) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 2))
        with torch.no_grad():
            model[2].weight[0, 0] = torch.nan
        with pytest.raises((ValueError, NotImplementedError)):
            convert(model)
        assert not converted(model)

    check(to_bayesian)
    with pytest.raises(AssertionError):
        check(by_class_name)


@pytest.mark.protects("same_activations")
def test_same_activations() -> None:
    """At the posterior mean the Bayesian model is the original; with its ReLU replaced it is another one."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def check(model: nn.Module) -> None:
        with posterior_mean(model):
            torch.testing.assert_close(model(X), original(X), rtol=0, atol=0)

    check(to_bayesian(copy.deepcopy(original)))
    swapped = copy.deepcopy(original)
    swapped[1] = nn.Softplus()
    with pytest.raises(AssertionError):
        check(to_bayesian(swapped))


# ------------------------------------------------------------------------------------------------------ the model's API


class Wrapper(nn.Module):
    """Holds a model and passes calls on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.mark.protects("wrapper_loses_api")
def test_wrapper_loses_api() -> None:
    """A converted model is the same object with its config, `generate` and `save_pretrained`."""

    def check(model: nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        assert model.config.model_type == "gpt2"
        generated = model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, 4)

    model = to_bayesian(case("gpt2-lm").build())
    check(model)
    with pytest.raises(AssertionError):
        check(Wrapper(model))


@pytest.mark.protects("from_pretrained_restores")
def test_from_pretrained_restores(tmp_path: Path) -> None:
    """A reload has every tensor, bit for bit; keys under names of another class load nothing and say nothing."""
    model = tiny.bayesian(freeze=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path)
    saved = model.state_dict()

    def check(restored: nn.Module) -> None:
        state = restored.state_dict()
        assert set(state) == set(saved)
        assert all(torch.equal(state[name], value) for name, value in saved.items())

    check(bayeformers.from_pretrained(tmp_path))
    renamed = {name.replace("weight", "mu_kernel"): value for name, value in saved.items()}
    other = tiny.bayesian(freeze=False, seed=1)
    other.load_state_dict(renamed, strict=False)
    with pytest.raises(AssertionError):
        check(other)
