"""PEFT's adapters in a Bayesian model: what they do to weights, and where that would lose draws.

Nothing of PEFT is imported: a model has its layers only where somebody else did.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .base import BayesianModule

ASIDE = "PEFT's `target_parameters` takes its parameter out of the module in every forward"
LATE = (
    "The active adapter {!r} of this %s came after the conversion and is deterministic, while the others are Bayesian: "
    "draws leave it as it is. To make it Bayesian call `to_deterministic(model)` with all adapters in place, then "
    "`to_bayesian` again."
)
_MERGE, _PLAIN = "merge", "_bayeformers_plain_adapters"


class MergeRefused:
    """Stands in for a tuner layer's ``merge`` where merging would lose or change draws."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to merge, whatever the arguments."""
        raise RuntimeError(
            f"The adapter of {self.name!r} cannot be merged: {self.reason}. `to_deterministic(model)` first merges at "
            "the posterior mean; `predict` and `fixed_draw` need no merging."
        )


def is_put_aside(owner: nn.Module | None) -> bool:
    """Whether ``owner`` adapts bare parameters of its child: class swaps on the child do not survive a forward."""
    wrapper = _peft("tuners.lora.layer", "ParamWrapper")
    return wrapper is not None and isinstance(owner, wrapper)


def refuse_merges(model: nn.Module) -> None:
    """Let ``merge``, and with it `merge_adapter` and `merge_and_unload`, raise where it would lose or change draws."""
    for name, layer in _tuner_layers(model):
        reason = _reason(layer)
        if reason is not None and _MERGE not in vars(layer):
            vars(layer)[_MERGE] = MergeRefused(name, reason)


def allow_merges(model: nn.Module) -> None:
    """Undo :func:`refuse_merges` and :func:`note_adapters`."""
    for module in model.modules():
        vars(module).pop(_PLAIN, None)
        if isinstance(vars(module).get(_MERGE), MergeRefused):
            del vars(module)[_MERGE]


def note_adapters(model: nn.Module) -> None:
    """At a conversion: keep in each tuner layer with Bayesian adapters which of its others are not, as was asked."""
    for _, layer in _tuner_layers(model):
        is_random = _randomness(layer)
        if any(is_random.values()):
            vars(layer)[_PLAIN] = tuple(name for name, is_so in is_random.items() if not is_so)


def late_adapters(model: nn.Module) -> list[str]:
    """Names of active adapters that came after the conversion into layers whose adapters it made Bayesian."""
    found: dict[str, None] = {}
    for _, layer in _tuner_layers(model):
        known = vars(layer).get(_PLAIN)
        if known is not None and not layer.disable_adapters:
            is_random = _randomness(layer)
            active = [name for name in layer.active_adapters if not is_random.get(name, True)]
            found.update(dict.fromkeys(name for name in active if name not in known))
    return list(found)


def merged_adapter(model: nn.Module, chosen: Iterable[str]) -> str | None:
    """Name of a tuner layer that is merged while a layer of its adapter is among those ``chosen``; None: no such."""
    names = set(chosen)
    for name, layer in _tuner_layers(model):
        inside = {f"{name}.{part}".lstrip(".") for part in _adapter_parts(layer)}
        if layer.merged and names & inside:
            return name
    return None


def _reason(layer: Any) -> str | None:
    if any(isinstance(part, BayesianModule) for part in _adapter_parts(layer).values()):
        return "its scales would be lost, and its draws with them"
    lora = _peft("tuners.lora.layer", "LoraLayer")
    is_sum = lora is not None and isinstance(layer, lora) and not getattr(layer, "lora_variant", None)
    random: list[Any] = [part for part in layer.get_base_layer().modules() if isinstance(part, BayesianModule)]
    if random and not is_sum:
        return "it would change the means of a Bayesian layer and leave their scales, so that its draws would change"
    if any(getattr(part, "is_factor", False) for part in random):
        return "the factors r s^T of the layer under it would multiply it too"
    if any(part.scale_floor(name) is not None for part in random for name in part.specs):
        return "the scale of the Bayesian layer under it is relative to the mean, so that its draws would change"
    return None


def _randomness(layer: Any) -> dict[str, bool]:
    """Whether the adapters of a tuner layer have a Bayesian tensor, by their names."""
    found: dict[str, bool] = {}
    for kind in layer.adapter_layer_names:
        container = getattr(layer, kind, None)
        if isinstance(container, nn.ParameterDict):
            names = getattr(container, "specs", {})
            found |= {name: found.get(name, False) or name in names for name in container}
        elif isinstance(container, nn.ModuleDict):
            for name, module in container.items():
                found[name] = found.get(name, False) or any(isinstance(m, BayesianModule) for m in module.modules())
    return found


def _adapter_parts(layer: Any) -> dict[str, nn.Module]:
    """Modules of a tuner layer, by their names in it, without those of the layer that it adapts."""
    return {name: part for name, part in layer.named_modules() if name.partition(".")[0] not in ("", "base_layer")}


def _tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = _peft("tuners.tuners_utils", "BaseTunerLayer")
    if kind is not None:
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def _peft(module: str, name: str) -> Any:
    return getattr(sys.modules.get(f"peft.{module}"), name, None)
