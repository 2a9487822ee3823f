"""PEFT's adapters under `to_bayesian`: what of them becomes Bayesian, by which names, and how fresh ones start.

The defaults for a model with adapters stand in `ADAPTERS`, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions import Prior, RelativePrior
from ..distributions.diagonal_normal import ScaleName
from ..nn.adapters import AdapterPart, adapter_parts, has_adapters, merged_adapter
from ..nn.base import BayesianModule
from ..nn.parameters import random_class
from ..patterns import Patterns
from .adalora import take_all, take_means

Entries = dict[str, tuple[str, ...]]
"""Of `ParameterDict`s in a model, by name, which of their Parameters are meant."""


@dataclass(frozen=True)
class AdapterDefaults:
    """What `to_bayesian` does with a model that has adapters, where the user says nothing.

    A fresh adapter has yet to learn its means. `MopedPrior` would hold A to its random start and B to 0, and a wide
    prior over more weights than data ends in noise; noise in A alone is noise of B A that is 0 as long as B is. Of an
    embedding's LoRA it is A that starts at 0.

    Attributes:
        delta: initial scale relative to |weight|.
        freeze: whether only scales train.
        prior: of every converted weight.
        scale: of every converted weight; it moves with a mean that trains.
        deterministic: PEFT's names of what stays deterministic in an active adapter: of LoRA the matrix that starts at
            0, and DoRA's magnitudes, which multiply the base weight, so that their noise is that of the base.
    """

    delta: float = 0.2
    freeze: bool = False
    prior: Prior = RelativePrior()
    scale: ScaleName = "multiplicative"
    deterministic: tuple[str, ...] = ("lora_B", "lora_embedding_A", "lora_magnitude_vector")


ADAPTERS = AdapterDefaults()

_UNLOAD = "_unload_and_optionally_merge"

listeners: list[Callable[[], None]] = []
"""Called when a model with adapters is converted, before anything changes: saving, which is of a later room."""


def target_of(model: nn.Module, target: Patterns | None) -> Patterns | None:
    """`target_modules`, of which None is "all" in a model without adapters."""
    if not has_adapters(model):
        return "all" if target is None else target
    for listener in listeners:
        listener()
    return target


def check_unmerged(model: nn.Module, chosen: Iterable[str]) -> None:
    """Raise ValueError where an adapter that is to become Bayesian is merged."""
    merged = merged_adapter(model, chosen)
    if merged is not None:
        raise ValueError(
            f"`model` has the adapter of {merged!r} merged into the weights beside it, where its draws would have no "
            "effect: call `model.unmerge_adapter()` first, or leave the adapter out by `target_modules`."
        )


class _Unloading:
    """Stands in for a tuner's ``_unload_and_optionally_merge``: what is left bears no record of a conversion."""

    is_shared_by_views = True

    def __init__(self, model: nn.Module, tuner: nn.Module, forget: Callable[[nn.Module], None]) -> None:
        self._model, self._tuner, self._forget = model, tuner, forget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unloaded = getattr(type(self._tuner), _UNLOAD)(self._tuner, *args, **kwargs)
        vars(self._tuner).pop(_UNLOAD, None)
        self._forget(self._model)
        return unloaded


def watch_unloading(model: nn.Module, forget: Callable[[nn.Module], None]) -> None:
    """Let `merge_and_unload` and `unload` of a converted model call ``forget`` of it afterwards."""
    take_means(model)
    tuner = model._modules.get("base_model")
    if tuner is not None and hasattr(type(tuner), _UNLOAD) and hasattr(model, "peft_config"):
        vars(tuner)[_UNLOAD] = _Unloading(model, tuner, forget)


def trained_heads(model: nn.Module, random: Iterable[str]) -> list[str]:
    """Names of the copies of heads that PEFT's `modules_to_save` trains now and of which nothing becomes Bayesian."""
    heads = [part.name for part in adapter_parts(model) if part.is_head and part.adapter != "original_module"]
    own = {name for name in heads if any(p.requires_grad for p in model.get_submodule(name).parameters())}
    return sorted(own - {above for name in random for above in _above(name, own)})


def forget_unloading(model: nn.Module) -> None:
    """Undo :func:`watch_unloading`."""
    take_all(model)
    for tuner in model.children():
        if isinstance(vars(tuner).get(_UNLOAD), _Unloading):
            del vars(tuner)[_UNLOAD]


def store_centres(model: nn.Module) -> None:
    """Keep the prior's centres of all adapters: which of them trains is for `set_adapter` to say, at any time."""
    for part in adapter_parts(model):
        layers = () if part.is_head else part.module.modules()
        for layer in (layer for layer in layers if isinstance(layer, BayesianModule)):
            for name in layer.specs:
                layer.store_centre(name)


def only_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``delta``, ``freeze``, ``prior`` and ``scale`` those that are given."""
    return {name: options[name] for name in ("delta", "freeze", "prior", "scale") if options.get(name) is not None}


def random_entries(container: nn.Module, keys: Iterable[str]) -> type[BayesianModule] | None:
    """Return the class of a `ParameterDict` in which the Parameters ``keys`` are random, vectors too; None: no such.

    For some adapters, as VeRA's, a vector is all that is trained.
    """
    own = container._parameters
    names = tuple(k for k in own if k in set(keys) and (p := own[k]) is not None and p.is_floating_point())
    return random_class(type(container), names) if names else None  # type: ignore[arg-type]


def entries_of(model: nn.Module) -> Entries:
    """By the name of every `ParameterDict` of an adapter, the names of all its Parameters."""
    found: dict[str, list[str]] = {}
    for part in adapter_parts(model):
        if part.is_bare:
            found.setdefault(part.container, []).append(part.adapter)
    return {name: tuple(keys) for name, keys in found.items()}


def active_names(model: nn.Module, among: Iterable[str] | None = None) -> set[str]:
    """Return the names of modules, and bare Parameters, of adapters that are in use; heads are none of them.

    Args:
        model: with adapters.
        among: PEFT's names of the containers that are meant, as they stand in the model, such as "...query.lora_A",
            which takes deterministic ones too; None: all but those that `ADAPTERS` leaves deterministic.
    """
    containers = None if among is None else set(among)
    found: set[str] = set()
    for part in adapter_parts(model):
        is_meant = part.kind not in ADAPTERS.deterministic if containers is None else part.container in containers
        if part.is_active and not part.is_head and is_meant:
            inner = {} if part.is_bare else dict(part.module.named_modules())
            found |= {part.name, *(f"{part.name}.{name}" for name in inner if name)}
    return found


def only_adapters(model: nn.Module, chosen: Iterable[str]) -> bool:
    """Whether all modules ``chosen`` belong to adapters, none to the base or a head."""
    own: set[str] = set()
    for part in adapter_parts(model):
        if not part.is_head:
            own |= {part.container} if part.is_bare else {part.name}
    return all(any(name == one or name.startswith(f"{one}.") for one in _above(name, own)) for name in chosen)


def _above(name: str, among: set[str]) -> list[str]:
    """Those of ``among`` that are ``name`` or hold it."""
    steps = name.split(".")
    return [path for count in range(len(steps)) if (path := ".".join(steps[: count + 1])) in among]


# -- fresh adapters ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def floors_of_zeros(model: nn.Module, random: Mapping[int, str]) -> dict[str, float]:
    r"""Return for all-zero tensors of adapters the scale over delta at which their layer has noise delta rms(W).

    LoRA starts with B = 0, so that delta |B| would be no noise at all. The weight that a layer adds is linear in the
    tensor that is zero, of LoRA :math:`\Delta W = s B A` with :math:`\mathrm{Var}\,\Delta W_{ij} = s^2 \sigma^2
    \sum_k A_{kj}^2` for iid entries of scale sigma in B, so that its root mean square is
    :math:`s \sigma \sqrt{r}\, \mathrm{rms}(A)`. It is set to :math:`\delta\, \mathrm{rms}(W)`: the share of the base
    weight that MOPED would give that weight itself. Other kinds are measured: what :math:`\Delta W` their tensor gives
    at standard normal values. Where no base weight can be read, rms(A) stands in for it; where PEFT cannot tell
    :math:`\Delta W`, the tensor has the floor of any all-zero one.

    Args:
        model: with adapters, before its conversion.
        random: by the id of each Parameter that becomes random, the name of its tensor.
    """
    found: dict[str, float] = {}
    for part in adapter_parts(model):
        if part.layer is None or not part.is_active:
            continue
        for parameter in part.parameters():
            name = random.get(id(parameter))
            if name is None or name in found or parameter.is_meta or bool(parameter.any()):
                continue
            gain = _gain(part, parameter)
            size = _rms_of_base(part.layer) or _rms_of_partner(part)
            if gain is not None and size and math.isfinite(size / gain):
                found[name] = size / gain
    return found


def floors_in(module: str, floors: Mapping[str, float]) -> dict[str, float]:
    """Of all floors those of one module's tensors, by their names there."""
    return {key: floor for name, floor in floors.items() for above, _, key in [name.rpartition(".")] if above == module}


def _gain(part: AdapterPart, tensor: Tensor) -> float | None:
    """Root mean square of the weight that is added, for iid entries of scale 1 in ``tensor``; None: unknown."""
    if part.kind == "oft_R":  # W (R - I), R - I = 2 Q to first order, of a skew Q with b x b blocks
        side = (1 + math.sqrt(1 + 8 * tensor.shape[-1])) / 2
        base = _rms_of_base(part.layer)
        return None if base is None else 2 * math.sqrt(side - 1) * base
    product = _PRODUCTS.get(part.kind)
    scaling = getattr(part.layer, "scaling", {})
    if product is not None and part.adapter in scaling and not hasattr(part.layer, "lora_E"):
        other = _tensor(part.layer, product, part.adapter)
        return None if other is None else scaling[part.adapter] * math.sqrt(_rank(part, other)) * rms(other) or None
    return _measured_gain(part, tensor)


_PRODUCTS = {
    "lora_A": "lora_B", "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A",
}  # fmt: skip


def _rank(part: AdapterPart, other: Tensor) -> int:
    rank = getattr(part.layer, "r", {})
    return int(rank.get(part.adapter, min(other.shape[:2])) if isinstance(rank, dict) else rank)


def _measured_gain(part: AdapterPart, tensor: Tensor) -> float | None:
    """By standard normal values of the tensor, 16 at most, from a generator of its own; the tensor is put back."""
    generator = torch.Generator().manual_seed(0)
    before = tensor.detach().clone()
    try:
        squares = []
        for _ in range(max(1, min(16, 256 // tensor.numel()))):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor))
            squares.append(rms(part.layer.get_delta_weight(part.adapter)) ** 2)
        return math.sqrt(sum(squares) / len(squares)) or None
    except (AttributeError, TypeError, NotImplementedError, RuntimeError, KeyError, ValueError):
        return None
    finally:
        tensor.copy_(before)


def _tensor(layer: Any, kind: str, adapter: str) -> Tensor | None:
    container = getattr(layer, kind, {})
    if adapter not in container:
        return None
    value = container[adapter]
    return value if isinstance(value, Tensor) else getattr(value, "weight", None)


def _rms_of_partner(part: AdapterPart) -> float | None:
    other = _tensor(part.layer, _PRODUCTS.get(part.kind, ""), part.adapter) if part.kind in _PRODUCTS else None
    return None if other is None else rms(other)


def _rms_of_base(layer: Any) -> float | None:
    """Of the weight that is adapted, unpacked if it is quantised; None: it cannot be read, or is 0."""
    base = layer.get_base_layer()
    weight: Any = getattr(base, getattr(layer, "parameter_name", None) or "weight", None)
    try:
        if isinstance(weight, Tensor) and not weight.is_floating_point():
            from peft.utils.integrations import dequantize_module_weight  # an extra

            weight = dequantize_module_weight(base)
        elif hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            weight = weight.dequantize()
        return None if weight is None or weight.is_meta else rms(weight) or None
    except (AttributeError, TypeError, NotImplementedError, RuntimeError, ImportError, ValueError):
        return None


def rms(tensor: Tensor) -> float:
    """Root of the mean square of the elements, as a number."""
    values = tensor.detach() if tensor.layout is torch.strided else tensor.detach().to_dense()
    norm = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return float(norm) / math.sqrt(max(values.numel(), 1))
