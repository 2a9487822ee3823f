"""What can be compared with itself later, and what is refused."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from bayeformers.sampling.random_state import rng_state, set_rng_state
from bayeformers.sampling.snapshot import Refused, flatten, module_state, rebuild, unchanged, versions

Pair = namedtuple("Pair", "a b")


class Subclass(torch.Tensor):
    pass


def test_leaves_keep_the_structure() -> None:
    x = torch.ones(2)
    assert flatten([x]) != flatten((x,))
    assert flatten({"a": 1, "b": 2}) != flatten({"b": 1, "a": 2})
    assert flatten(BaseModelOutput(last_hidden_state=x))[1] is x
    assert flatten(((1,), 2)) != flatten(((1, 2),))


REFUSED: list[Any] = [
    DynamicCache(),
    Pair(1, 2),
    torch.ones(2).as_subclass(Subclass),
    torch.eye(2).to_sparse(),
    {"a": {3}},
    object(),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_cannot_be_compared_is_refused(value: Any) -> None:
    with pytest.raises(Refused):
        flatten([value])


def test_tensors_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        value = torch.ones(2)
    with pytest.raises(Refused):
        flatten(value)


def test_rebuilt_containers_are_fresh_around_the_same_tensors() -> None:
    x = torch.ones(2)
    value = {"a": [x], "b": (x, None), "c": BaseModelOutput(last_hidden_state=x)}
    fresh = rebuild(value)
    fresh["a"].pop()
    assert value["a"] == [x] and fresh["b"][0] is x and fresh["c"].last_hidden_state is x


CHANGES = {
    "parameter": lambda net: net[0].weight.add_(1),
    "buffer": lambda net: net[1].running_mean.add_(1),
    "swapped storage": lambda net: setattr(net[0].weight, "data", net[0].weight.data.clone()),
    "number": lambda net: setattr(net[1], "eps", 0.1),
    "private attribute": lambda net: setattr(net[0], "_scale", 2),
    "inside a list": lambda net: net[0].notes.append(1),
    "object": lambda net: setattr(net[0], "config", object()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_what_a_module_reads_is_seen(change: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    net[0].notes, net[0].config = [], object()
    before = module_state(net)
    assert unchanged(before, module_state(net))
    with torch.no_grad():
        change(net)
    assert not unchanged(before, module_state(net))


def test_training_and_hooks_inside_are_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    net.register_forward_hook(lambda *_: None)  # its own hook runs outside `forward`, in every pass
    module_state(net)
    handle = net[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(Refused, match="Linear has a forward hook"):
        module_state(net)
    handle.remove()
    net[1].train()
    with pytest.raises(Refused, match="Dropout is in training mode"):
        module_state(net)


def test_a_sparse_buffer_is_refused() -> None:
    net = nn.Linear(2, 2).eval()
    net.register_buffer("graph", torch.eye(2).to_sparse())
    with pytest.raises(Refused):
        module_state(net)


def test_versions_count_edits_of_views_too() -> None:
    x = torch.zeros(2, 2)
    before = versions([x, 1])
    x[0].add_(1)
    assert versions([x, 1]) != before


def test_random_state_is_restored() -> None:
    state = rng_state()
    first = torch.rand(3)
    set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
