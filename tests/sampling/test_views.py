"""Predicting leaves no mark on a model: what its first forward adds to it is added once."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import predict, to_bayesian
from bayeformers.laplace import fit
from tests.cases import case


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5"])
def test_hidden_states_after_a_prediction(name: str) -> None:
    """transformers' models install their recorders in the first forward, which may be one of a prediction."""
    this = case(name)
    inputs: dict[str, Any] = {**this.inputs(), "output_hidden_states": True}

    def states(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output = model.eval()(**inputs)
        return [*(output.get("hidden_states") or ()), *(output.get("encoder_hidden_states") or ())]

    expected, model = states(to_bayesian(this.build(), delta=0.1)), to_bayesian(this.build(), delta=0.1)
    for _ in range(2):
        predict(model, inputs, num_samples=2)
        found = states(model)
        assert len(found) == len(expected) > 0
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_hidden_states_after_a_fit() -> None:
    this = case("bert")
    expected, model = this.build().eval(), this.build().eval()
    inputs: dict[str, Any] = {**this.inputs(), "output_hidden_states": True}
    fit(model, [{**inputs, **this.labels()}], progress=False).predict(inputs)
    with torch.no_grad():
        assert len(model(**inputs).hidden_states) == len(expected(**inputs).hidden_states)


def test_a_forward_that_calls_the_model_of_its_closure_is_drawn() -> None:
    """trl's fused head replaces `model.forward` by a function that calls the one it found: a view would bypass it."""
    this = case("gpt2")
    plain, patched = to_bayesian(this.build(), delta=0.3), to_bayesian(this.build(), delta=0.3)
    found = patched.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return found(*args, **kwargs)

    patched.forward = types.MethodType(forward, patched)
    expected, drawn = (predict(model, this.inputs(), num_samples=2) for model in (plain, patched))
    torch.testing.assert_close(drawn.log_probs, expected.log_probs)
    assert float(drawn.mutual_information.max()) > 0
