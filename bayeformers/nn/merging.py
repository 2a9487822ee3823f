"""Merging Bayesian adapters into the weights beside them: the posterior mean, or the draw that is held, and back.

Nothing of PEFT is imported: a model has its layers only where somebody else did. `merge_adapter`, `merge_and_unload`
and the like call each tuner layer's ``merge``; what stands in for it is kept on the layer itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import adapter_modules, lora_like, tuner_layers
from .base import BayesianModule
from .holds import Held
from .reading import MEAN

logger = logging.getLogger(__name__)

_REQUANTISED = ("Int8Params",)  # what it computes with lies elsewhere: PEFT adds and subtracts in 8 bits
_ADDED_TO = ("Parameter", "Params4bit", "Int8Params")  # weights that PEFT's `merge` changes
_MERGE, _UNMERGE, _KEPT = "merge", "unmerge", "_bayeformers_before_merge"


class MergeRefused:
    """Stands in for a tuner layer's ``merge`` where merging would lose or change draws."""

    is_shared_by_views = True

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to merge, whatever the arguments."""
        raise RuntimeError(
            f"The adapter of {self.name!r} cannot be merged: {self.reason}. `to_deterministic(model)` first merges at "
            "the posterior mean; `predict` and `fixed_draw` need no merging."
        )


class _Said:
    """Whether a merge of this model's adapters has been told of; shared by its layers."""

    is_shared_by_views = True
    is_told = False


class Merge:
    """Stands in for ``merge`` of a Bayesian adapter: keeps the weights beside it, and says what is merged."""

    is_shared_by_views = True

    def __init__(self, layer: nn.Module, said: _Said) -> None:
        self._layer, self._said = layer, said

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Merge the mean or, inside `fixed_draw`, that draw."""
        layer: Any = self._layer
        kept = vars(layer).get(_KEPT) or _weights_beside(layer)
        type(layer).merge(layer, *args, **kwargs)
        if not layer.merged:
            return
        vars(layer)[_KEPT] = kept
        if not self._said.is_told:
            self._said.is_told = True
            logger.warning("The adapter is merged at %s: until it is unmerged it draws no noise.", _what(layer))


class Unmerge:
    """Stands in for ``unmerge``: the weights beside the adapter are those from before, bit for bit."""

    is_shared_by_views = True

    def __init__(self, layer: nn.Module, said: _Said) -> None:
        self._layer, self._said = layer, said

    def __call__(self) -> None:
        """Unmerge, whatever is drawn now."""
        layer: Any = self._layer
        kept: list[_Before] = vars(layer).pop(_KEPT, [])
        type(layer).unmerge(layer)
        self._said.is_told = False
        with torch.no_grad():
            for before in kept:
                before.restore()


class _Before:
    """A Parameter as it was: PEFT adds to a float one in place, and replaces a quantised one."""

    def __init__(self, owner: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self._owner, self._name, self._parameter = owner, name, parameter
        self._value: Tensor | None = parameter.detach().clone() if parameter.is_floating_point() else None

    def restore(self) -> None:
        self._owner._parameters[self._name] = self._parameter
        if self._value is not None:
            self._parameter.data.copy_(self._value)


def stand_in_for_merges(model: nn.Module) -> None:
    """Let ``merge`` of Bayesian adapters keep what it changes, and raise where draws would be lost or changed."""
    said = next((stand._said for _, stand in _stand_ins(model) if isinstance(stand, Merge)), _Said())
    for name, layer in tuner_layers(model):
        own = vars(layer)
        reason = _reason(layer)
        if reason is not None:
            own.setdefault(_MERGE, MergeRefused(name, reason))
        elif _MERGE not in own and any(isinstance(part, BayesianModule) for part in adapter_modules(layer).values()):
            own[_MERGE], own[_UNMERGE] = Merge(layer, said), Unmerge(layer, said)


def stock_merges(model: nn.Module) -> None:
    """Undo :func:`stand_in_for_merges`; what is merged stays so."""
    for module, stand_in in list(_stand_ins(model)):
        name = _UNMERGE if isinstance(stand_in, Unmerge) else _MERGE
        vars(module).pop(name, None)
        vars(module).pop(_KEPT, None)


def _stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        for name in (_MERGE, _UNMERGE):
            stand_in: Callable[..., None] | None = vars(module).get(name)
            if isinstance(stand_in, (MergeRefused, Merge, Unmerge)):
                yield module, stand_in


def _weights_beside(layer: Any) -> list[_Before]:
    base, only = layer.get_base_layer(), getattr(layer, "parameter_name", None)
    found = []
    for owner in base.modules():
        for name, parameter in owner._parameters.items():
            is_meant = only is None or (owner is base and name == only)
            if parameter is not None and is_meant and type(parameter).__name__ not in _REQUANTISED:
                found.append(_Before(owner, name, parameter))
    return found


def _what(layer: Any) -> str:
    """In words, what its Bayesian tensors are at present."""
    parts = adapter_modules(layer).values()
    draw: Held | None = next((part.draw for part in parts if isinstance(part, BayesianModule)), None)
    if draw is None or draw is MEAN:
        return "the posterior mean (inside `fixed_draw(model, index)`: at that draw)"
    return f"draw {draw.index} of seed {draw.seed}"


def _reason(layer: Any) -> str | None:
    weight = layer.get_base_layer()._parameters.get("weight")
    if weight is not None and type(weight).__name__ not in _ADDED_TO:
        return f"the weight beside it is a {type(weight).__name__}, which PEFT would leave as it is"
    random: list[Any] = [part for part in layer.get_base_layer().modules() if isinstance(part, BayesianModule)]
    if random and not lora_like(layer):
        return "it would change the means of a Bayesian layer and leave their scales, so that its draws would change"
    if any(getattr(part, "is_factor", False) for part in random):
        return "the factors r s^T of the layer under it would multiply it too"
    if any(part.scale_floor(name) is not None for part in random for name in part.specs):
        return "the scale of the Bayesian layer under it is relative to the mean, so that its draws would change"
    return None
