"""The matrix itself: every model builds the same twice, runs with padding, and has the layers that its case names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.cases import CASES, Case, expand

EXACT = {nn.Linear: "Linear", nn.Embedding: "Embedding", Conv1D: "Conv1D", nn.Conv1d: "Conv1d", nn.Conv2d: "Conv2d"}
SUBCLASSES = (
    "BartScaledWordEmbedding",
    "BartLearnedPositionalEmbedding",
    "OPTLearnedPositionalEmbedding",
    "WhisperPositionalEmbedding",
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_expand_multiplies_braces() -> None:
    assert expand("a.{0,1}.{k,v}") == ["a.0.k", "a.0.v", "a.1.k", "a.1.v"]


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@each_case
def test_layers_are_those_of_the_model(case: Case) -> None:
    found = {name: EXACT[type(module)] for name, module in case.build().named_modules() if type(module) in EXACT}
    subclasses = {name for name, module in case.build().named_modules() if type(module).__name__ in SUBCLASSES}
    assert found | dict.fromkeys(subclasses, "Embedding") == case.layers
    assert case.read | case.uncalled <= set(case.layers)
    assert case.unused <= case.bare


@each_case
def test_bare_tensors_are_the_matrices_of_no_layer(case: Case) -> None:
    shapes = {name: p.dim() for name, p in case.build().named_parameters(remove_duplicate=False)}
    assert {n for n, dim in shapes.items() if dim > 1 and n.rpartition(".")[0] not in case.layers} == case.bare


@each_case
def test_ties_are_those_of_the_model(case: Case) -> None:
    groups: dict[int, set[str]] = {}
    for name, parameter in case.build().named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    assert {frozenset(group) for group in groups.values() if len(group) > 1} == set(case.tied)


@each_case
def test_parts_name_parameters(case: Case) -> None:
    model = case.build()
    for part in ("head", "last", "middle", "embeddings"):
        assert 0 < len(case.parameters(model, part)) < len(case.parameters(model)), part


@each_case
def test_runs_the_same_twice_and_depends_on_its_inputs(case: Case) -> None:
    called: set[str] = set()
    model = case.build()
    for name in case.layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        first = model(**case.inputs())
        second = case.build()(**case.inputs())
    logits = next(value for value in first.values() if isinstance(value, torch.Tensor))
    torch.testing.assert_close(logits, next(v for v in second.values() if isinstance(v, torch.Tensor)), rtol=0, atol=0)
    assert torch.isfinite(logits).all() and logits.std() > 1e-3
    assert set(case.layers) - called == case.uncalled


@each_case
def test_labels_give_a_finite_loss(case: Case) -> None:
    if not case.labels():
        pytest.skip("the model has no supervised loss of its own")
    batch = {key: value for key, value in case.inputs().items() if not key.startswith("decoder_")}
    assert torch.isfinite(case.build()(**batch, **case.labels()).loss)
