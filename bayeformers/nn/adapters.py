"""PEFT's adapters in a Bayesian model: what is whose, which are in use, and what their switching does to flags.

Nothing of PEFT is imported: a model has its layers only where somebody else did.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..sampling.walk import named_modules
from .base import BayesianModule, NamedVariational, variational_tensors

ASIDE = "PEFT's `target_parameters` takes its parameter out of the module in every forward"
LATE = (
    "The active adapter {!r} of this %s was not converted and is deterministic, while the others are Bayesian: draws "
    "leave it as it is. To make it Bayesian call `to_deterministic(model)` with all adapters in place, then "
    "`to_bayesian` again."
)
_PLAIN = "_bayeformers_plain_adapters"
_SWITCHES = ("set_adapter", "enable_adapters", "set_requires_grad")


@dataclass(frozen=True)
class AdapterPart:
    """What one adapter has in one tuner layer, in the encoder of its prompt, or as its copy of a head.

    Attributes:
        container: name in the model of what holds it, as PEFT says it, such as "...query.lora_A".
        adapter: the adapter's name.
        module: the part; of a bare Parameter the `ParameterDict` that holds it.
        is_bare: whether it is a bare Parameter, whose name in ``module`` is the adapter's.
        is_active: whether a forward uses it now: of an active adapter that is neither disabled nor merged.
        is_head: whether it is a copy of a module in `modules_to_save`, or the module that was copied.
        layer: the tuner layer that it belongs to; None of a prompt and of a head.
    """

    container: str
    adapter: str
    module: nn.Module
    is_bare: bool
    is_active: bool
    is_head: bool = False
    layer: Any = None

    @property
    def name(self) -> str:
        """The part's name in the model."""
        return f"{self.container}.{self.adapter}".lstrip(".")

    @property
    def kind(self) -> str:
        """PEFT's name of what it is, such as "lora_A"."""
        return self.container.rpartition(".")[2]

    def holds_any(self, names: Iterable[str]) -> bool:
        """Whether one of these modules of the model is the part, or holds it, or lies inside it."""
        own = self.container if self.is_bare else self.name
        return any(name == own or name.startswith(f"{own}.") for name in names)

    def parameters(self) -> list[Tensor]:
        """Its Parameters."""
        if self.is_bare:
            return [p for p in (self.module._parameters.get(self.adapter),) if p is not None]
        return list(self.module.parameters())


def adapter_parts(model: nn.Module) -> Iterator[AdapterPart]:
    """Every part of every adapter of ``model``, and the copies of heads."""
    wrapper, tuner = _peft("utils.other", "ModulesToSaveWrapper"), _peft("tuners.tuners_utils", "BaseTunerLayer")
    if tuner is None:
        return
    for name, module in named_modules(model):
        if isinstance(module, tuner):
            yield from _of_layer(name, module)
        elif isinstance(module, wrapper):
            yield from _of_head(name, module)
        elif isinstance(encoders := module._modules.get("prompt_encoder"), nn.ModuleDict):
            active = None if getattr(module, "_adapters_disabled", False) else getattr(module, "active_adapter", None)
            path = f"{name}.prompt_encoder".lstrip(".")
            for adapter, encoder in encoders.items():
                yield AdapterPart(path, adapter, encoder, is_bare=False, is_active=adapter == active)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter, or a prompt, into ``model``."""
    return any(not part.is_head for part in adapter_parts(model))


def active_tensors(model: nn.Module) -> list[NamedVariational]:
    """Return the Bayesian tensors of ``model`` but those that belong to adapters alone which are not in use.

    An adapter that is not active, is disabled or merged takes no part in the network, and so has no KL.
    """
    tensors = list(variational_tensors(model))
    idle: set[int] = set()
    in_parts: set[int] = set()
    active: set[int] = set()
    for part in adapter_parts(model):
        ids = {id(parameter) for parameter in part.parameters()}
        (active if part.is_active else idle).update(ids)
        in_parts |= {id(part.module)} if part.is_bare else {id(module) for _, module in named_modules(part.module)}
    if not idle:
        return tensors
    for _, module in named_modules(model):  # a tensor that a layer outside uses too
        if isinstance(module, BayesianModule) and id(module) not in in_parts:
            active |= {id(module.get_parameter(name)) for name in module.specs}
    return [tensor for tensor in tensors if id(tensor.loc) in active or id(tensor.loc) not in idle]


def name_heads(model: nn.Module) -> None:
    """Give the copies that PEFT has made of a Bayesian head noise of their own: they are other tensors."""
    for part in adapter_parts(model) if has_adapters(model) else ():
        if not part.is_head or part.adapter == "original_module":
            continue
        for module in (module for module in part.module.modules() if isinstance(module, BayesianModule)):
            for name, spec in module.specs.items():
                if spec.named and "modules_to_save." not in spec.name:
                    module.specs[name] = replace(spec, name=f"{spec.name}.modules_to_save.{part.adapter}")


def is_put_aside(owner: nn.Module | None) -> bool:
    """Whether ``owner`` adapts bare parameters of its child: class swaps on the child do not survive a forward."""
    wrapper = _peft("tuners.lora.layer", "ParamWrapper")
    return wrapper is not None and isinstance(owner, wrapper)


class KeepsFrozen:
    """Stands in for a switch of PEFT that sets `requires_grad`: means that the conversion froze stay so."""

    is_shared_by_views = True

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer, self._name = layer, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Switch, and freeze the means again."""
        getattr(type(self._layer), self._name)(self._layer, *args, **kwargs)
        for module in self._layer.modules():
            for name in getattr(module, "specs", ()) if isinstance(module, BayesianModule) else ():
                module.get_parameter(name).requires_grad_(False)


def keep_frozen(model: nn.Module) -> None:
    """Let `set_adapter`, `disable_adapter` and the like leave frozen means frozen."""
    for module in _switchable(model):
        for name in _SWITCHES:
            if callable(getattr(type(module), name, None)):
                vars(module)[name] = KeepsFrozen(module, name)


def let_thaw(model: nn.Module) -> None:
    """Undo :func:`keep_frozen`."""
    for module in model.modules():
        for name in _SWITCHES:
            if isinstance(vars(module).get(name), KeepsFrozen):
                del vars(module)[name]


def note_adapters(model: nn.Module) -> None:
    """At a conversion: keep in each tuner layer with Bayesian adapters which of its others are not, as was asked."""
    for _, layer in tuner_layers(model):
        is_random = _randomness(layer)
        if any(is_random.values()):
            vars(layer)[_PLAIN] = tuple(name for name, is_so in is_random.items() if not is_so)


def notice_other_adapters(model: nn.Module) -> None:
    """After a conversion of the active adapters by default: another one that becomes active is told of, as if late."""
    for _, layer in tuner_layers(model):
        if _PLAIN in vars(layer):
            vars(layer)[_PLAIN] = ()


def forget_adapters(model: nn.Module) -> None:
    """Undo :func:`note_adapters`."""
    for module in model.modules():
        vars(module).pop(_PLAIN, None)


def late_adapters(model: nn.Module) -> list[str]:
    """Names of active adapters that came after the conversion into layers whose adapters it made Bayesian."""
    found: dict[str, None] = {}
    for _, layer in tuner_layers(model):
        known = vars(layer).get(_PLAIN)
        if known is not None and not layer.disable_adapters:
            is_random = _randomness(layer)
            active = [name for name in layer.active_adapters if not is_random.get(name, True)]
            found.update(dict.fromkeys(name for name in active if name not in known))
    return list(found)


def merged_adapter(model: nn.Module, chosen: Iterable[str]) -> str | None:
    """Name of a tuner layer that is merged while a layer of its adapter is among those ``chosen``; None: no such."""
    names = set(chosen)
    for name, layer in tuner_layers(model):
        inside = {f"{name}.{part}".lstrip(".") for part in adapter_modules(layer)}
        if layer.merged and names & inside:
            return name
    return None


def adapter_modules(layer: Any) -> dict[str, nn.Module]:
    """Modules of a tuner layer, by their names in it, without those of the layer that it adapts."""
    return {name: part for name, part in layer.named_modules() if name.partition(".")[0] not in ("", "base_layer")}


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer of PEFT's that adapts another."""
    kind = _peft("tuners.tuners_utils", "BaseTunerLayer")
    if kind is not None:
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def lora_like(layer: Any) -> bool:
    """Whether a tuner layer adds B A to a weight, and does nothing else with it."""
    lora = _peft("tuners.lora.layer", "LoraLayer")
    return lora is not None and isinstance(layer, lora) and not getattr(layer, "lora_variant", None)


def _of_layer(name: str, layer: Any) -> Iterator[AdapterPart]:
    active = () if layer.disable_adapters or layer.merged else layer.active_adapters
    for kind in layer.adapter_layer_names:
        container = getattr(layer, kind, None)
        if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
            is_bare, path = isinstance(container, nn.ParameterDict), f"{name}.{kind}".lstrip(".")
            for key, value in container.items():
                module = container if is_bare else value
                yield AdapterPart(path, key, module, is_bare=is_bare, is_active=key in active, layer=layer)


def _of_head(name: str, wrapper: Any) -> Iterator[AdapterPart]:
    active = () if wrapper.disable_adapters else wrapper.active_adapters
    for key, module in wrapper.modules_to_save.items():
        path = f"{name}.modules_to_save".lstrip(".")
        yield AdapterPart(path, key, module, is_bare=False, is_active=key in active, is_head=True)
    is_original_used = not any(key in wrapper.modules_to_save for key in active)
    original = wrapper.original_module
    yield AdapterPart(name, "original_module", original, is_bare=False, is_active=is_original_used, is_head=True)


def _switchable(model: nn.Module) -> Iterator[nn.Module]:
    kinds = _peft("tuners.tuners_utils", "BaseTunerLayer"), _peft("utils.other", "AuxiliaryTrainingWrapper")
    found = tuple(kind for kind in kinds if kind is not None)
    yield from (module for module in model.modules() if isinstance(module, found))


def _randomness(layer: Any) -> dict[str, bool]:
    """Whether the adapters of a tuner layer have a Bayesian tensor, by their names."""
    found: dict[str, bool] = {}
    for part in _of_layer("", layer):
        if part.is_bare:
            is_random = part.adapter in getattr(part.module, "specs", {})
        else:
            is_random = any(isinstance(module, BayesianModule) for module in part.module.modules())
        found[part.adapter] = found.get(part.adapter, False) or is_random
    return found


def _peft(module: str, name: str) -> Any:
    return getattr(sys.modules.get(f"peft.{module}"), name, None)
