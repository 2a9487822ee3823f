"""A walk over a model's modules, against torch's own."""

from __future__ import annotations

import pytest
from torch import nn

from bayeformers.sampling.walk import named_modules
from tests.cases import case


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2-lm"])
def test_as_torch_walks(name: str) -> None:
    model = case(name).build()
    assert list(named_modules(model)) == list(model.named_modules())


def test_shared_missing_and_nested_modules() -> None:
    shared, model = nn.Linear(2, 2), nn.Module()
    model.first = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Tanh())})
    model.nothing = None
    model.register_module("none", None)
    model.again, model.itself = model.first, nn.ModuleList([model.first["b"]])
    assert list(named_modules(model)) == list(model.named_modules())
