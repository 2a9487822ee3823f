"""Conversions and their like are whole or did not happen: stopped at each of their calls, the model is as before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import to_bayesian, to_deterministic, unfreeze
from bayeformers.conversion import pruning
from tests.cases import case


def state(model: nn.Module) -> dict[str, Any]:
    """All that a conversion could change, comparable."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        found[name] = (type(module), sorted(vars(module)), {k: id(v) for k, v in own.items() if not _is_number(v)})
        found[f"{name} numbers"] = {key: value for key, value in own.items() if _is_number(value)}
        for key in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            found[f"{name} {key}"] = {k: id(v) for k, v in vars(module)[key].items()}
        found[f"{name} always"] = dict(module._forward_hooks_always_called)
        found[f"{name} specs"] = dict(getattr(module, "specs", {}))
    found["flags"] = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found["values"] = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    if hasattr(model, "config"):
        found["config"] = model.config.to_dict()
        found["ties"] = dict(model.all_tied_weights_keys)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


class Interrupt:
    """Raises KeyboardInterrupt at the package's call number ``at``, while its own rollback goes on."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or "/bayeformers/" not in path or path.endswith("rollback.py"):
            return
        self.calls += 1
        if self.calls == self.at:
            sys.settrace(None)
            raise KeyboardInterrupt


def interrupted(change: Callable[[], Any], at: int) -> bool:
    """Whether the change was stopped before it was done."""
    sys.settrace(Interrupt(at))  # type: ignore[arg-type]
    try:
        change()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.LSTM(4, 3), nn.TransformerEncoderLayer(4, 2, 8))
    model[0].bias.requires_grad_(False)
    return model


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "to_bayesian": (lambda model: None, lambda model: to_bayesian(model, norms=True)),
    "training means": (lambda model: None, lambda model: to_bayesian(model, freeze=False, scale="multiplicative")),
    "to_deterministic": (to_bayesian, to_deterministic),
    "unfreeze": (to_bayesian, unfreeze),
    "prune": (to_bayesian, lambda model: pruning.prune(model, 0.5)),
}


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # a generator that is closed on the way is a call too
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("make", [small, case("bert-mlm").build], ids=["small", "tied"])
def test_stopped_anywhere(name: str, make: Callable[[], nn.Module]) -> None:
    """Nothing is half changed, and the change works afterwards."""
    prepare, change = CHANGES[name]
    model = make()
    prepare(model)
    before, at, step = state(model), 1, 11 if make is small else 59
    while interrupted(lambda: change(model), at):
        assert state(model) == before, f"{name} stopped at call {at}"
        at += step
    assert at > step and state(model) != before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_any_exception(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    before = state(model)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr("bayeformers.conversion.convert.switch_fused_off", fails)
    with pytest.raises(error):
        to_bayesian(model)
    assert state(model) == before
    monkeypatch.undo()
    assert to_deterministic(to_bayesian(model)) is model
