"""Which torch layer becomes which Bayesian layer: by exact class; what reads a weight in its own way, by its code."""

from __future__ import annotations

import dis
import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import nn as bnn
from ..nn.adapters import ASIDE, is_put_aside
from ..nn.base import BayesianModule
from ..nn.norms import AnyRMSNorm, is_rms_norm
from ..nn.parameters import name_clash, random_class, random_names

Found = tuple[type[BayesianModule] | None, str]

_BAYESIAN: dict[type[nn.Module], type[BayesianModule]] = {}
_NAMING = frozenset(dis.opname[op] for op in (*dis.hasname, *dis.hasfree))
_LOADING = frozenset(dis.opname[op] for op in (*dis.haslocal, *dis.hasfree, *dis.hasname))
_SET_UP = {"__init__", "_init_weights"}
_PAST = {"_parameters", "parameters", "named_parameters", "get_parameter", "state_dict", "_flat_weights"}
_BYPASSES = {"F", "functional", "linear", "embedding", "matmul", "parameters", "get_parameter"}
_CACHE = "attention_bias_cache"
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh|hr)_l\d|_flat_weights|all_weights")


def register_layer(torch_class: type[nn.Module]) -> Callable[[type[BayesianModule]], type[BayesianModule]]:
    """Return a decorator: `to_bayesian` turns instances of exactly ``torch_class`` into the decorated layer.

    Raises:
        TypeError: ``torch_class`` is no class, or the decorated one not both a `BayesianModule` and a subclass of it.
    """
    if not isinstance(torch_class, type):
        raise TypeError(f"`torch_class` must be a class of layers, got {torch_class!r}.")

    def register(bayesian: type[BayesianModule]) -> type[BayesianModule]:
        if not (issubclass(bayesian, BayesianModule) and issubclass(bayesian, torch_class)):
            raise TypeError(
                f"`register_layer({torch_class.__name__})` needs a subclass of BayesianModule and of "
                f"{torch_class.__name__}, got {bayesian.__name__}."
            )
        _BAYESIAN[torch_class] = bayesian
        return bayesian

    return register


_CONVOLUTIONS = (bnn.Conv1d, bnn.Conv2d, bnn.Conv3d, bnn.ConvTranspose1d, bnn.ConvTranspose2d, bnn.ConvTranspose3d)
_LOOKUPS = (bnn.Embedding, bnn.EmbeddingBag)
_NORMS = (bnn.LayerNorm, bnn.RMSNorm)
_OTHERS = (bnn.Linear, bnn.Conv1D, bnn.Bilinear, bnn.MultiheadAttention, bnn.LSTM, bnn.GRU)
for _layer in (*_OTHERS, *_LOOKUPS, *_CONVOLUTIONS, *_NORMS):
    register_layer(_layer.torch_class)(_layer)


def supported_layers() -> list[str]:
    """Names of the layers that can become Bayesian."""
    return sorted(f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in _BAYESIAN)


def is_layer(module: nn.Module) -> bool:
    """Whether the module is of a supported class or a subclass of one, so that its parameters are used as there."""
    return any(cls in _BAYESIAN for cls in type(module).__mro__)


def bayesian_class(module: nn.Module, owner: nn.Module | None = None, attribute: str = "") -> Found:
    """Return the Bayesian class for this instance, or None and the reason why it stays deterministic.

    Args:
        module: the instance that is to become Bayesian.
        owner: the module that holds it; None: it is the whole model.
        attribute: the name under which ``owner`` holds it.
    """
    if is_put_aside(owner):
        return None, ASIDE
    source = type(module)
    kind = _BAYESIAN.get(source) or _cooperative(source)  # type: ignore[arg-type]
    if kind is None and is_rms_norm(module):
        kind = _rms_norm(source)  # type: ignore[arg-type]
    if kind is None:
        return _random_parameters(module)
    if not _forwards_by_class(module):
        return None, "its `forward` was replaced on the instance and would bypass the draw"
    if reason := kind.refusal(module):
        return None, reason
    if owner is not None and is_only_read(owner, attribute):
        return _random_parameters(module)
    return kind, ""


def _random_parameters(module: nn.Module) -> Found:
    """For weights that a call of the layer does not reach: of a known layer all of them, else the matrices."""
    source = type(module)
    base = next((_BAYESIAN[cls] for cls in source.__mro__ if cls in _BAYESIAN), None)
    names = random_names(module, () if base is None else base.names_of(module))
    if not names:
        return None, f"{source.__name__} is not a supported layer"
    if reason := None if base is None else base.refusal(module):
        return None, reason
    if takes_past_names(source):  # type: ignore[arg-type]
        return None, f"the forward of {source.__name__} takes its parameters otherwise than by attribute"
    if _CACHE in vars(module):  # LeViT and its kin: the first draw read would serve every later one
        return None, f"{source.__name__} keeps values made of its weights between calls, in `{_CACHE}`"
    if clash := name_clash(module):
        return None, f"{source.__name__} has an attribute {clash!r}, which a Bayesian layer needs for itself"
    return random_class(source, names), ""  # type: ignore[arg-type]


def _forwards_by_class(module: nn.Module) -> bool:
    """Whether a call ends in the class's `forward`; accelerate's hooks wrap it, or leave it bound to the instance."""
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


@functools.cache
def _cooperative(source: type[nn.Module]) -> type[BayesianModule] | None:
    """Return the Bayesian class of a subclass that adds to `super().forward(...)` and reads no weight itself.

    It takes the draw by inheritance.

    Its Bayesian class has the registered layer between it and torch's, where `super()` finds it. Examples: scaled word
    embeddings and learned position embeddings with an offset, in BART and its kin.
    """
    base = next((cls for cls in source.__mro__ if cls in _BAYESIAN), None)
    if base is None:
        return None
    for cls in source.__mro__[: source.__mro__.index(base)]:
        code = getattr(cls.__dict__.get("forward"), "__code__", None)
        if "forward" in cls.__dict__ and (
            code is None or not _only_calls_super(code) or _calls_own(source, base, code)
        ):
            return None
    if source.forward is base.forward:
        return None  # nothing of its own in forward: whoever made the subclass uses its weight elsewhere
    return type(
        source.__name__,
        (source, _BAYESIAN[base]),
        {"torch_class": source, "__module__": __name__, "__reduce_ex__": _reduce},
    )


@functools.cache
def _rms_norm(source: type[nn.Module]) -> type[BayesianModule]:
    """A Bayesian class for an RMSNorm class of any library: about 60 models of transformers bring one of their own."""
    members = {"torch_class": source, "__module__": __name__, "__reduce_ex__": _reduce}
    return type(source.__name__, (AnyRMSNorm, source), members)


def _only_calls_super(code: types.CodeType) -> bool:
    """Whether a forward calls `super().forward(...)` and of its own weight reads no more than device and dtype."""
    if any(isinstance(const, types.CodeType) or const in ("weight", "bias") for const in code.co_consts):
        return False  # an inner function, or `getattr` by name, may read it
    names = [str(i.argval) for i in dis.get_instructions(code) if i.opname in _NAMING]
    if not {"super", "forward"} <= set(names) or set(names) & _BYPASSES or any(map(_RECURRENT.match, names)):
        return False
    followers = [after for name, after in zip(names, [*names[1:], ""], strict=True) if name in ("weight", "bias")]
    return set(followers) <= {"device", "dtype"}


def _calls_own(source: type[nn.Module], base: type[nn.Module], code: types.CodeType) -> bool:
    """Whether a forward uses a method or property of its own classes, which may read the weight."""
    classes = source.__mro__[: source.__mro__.index(base)]
    own = {
        name for cls in classes for name, value in vars(cls).items() if callable(value) or isinstance(value, property)
    }
    return bool((own - {"forward", "__class__"}) & set(code.co_names))


def is_only_read(owner: nn.Module, attribute: str) -> bool:
    """Return whether ``owner`` only reads the weight of its child ``attribute``, and so never calls it.

    A draw inside the child's forward would not reach it, so its tensors are `RandomParameters`. Examples: relative
    positions in DeBERTa's encoder, the projections of WavLM's attention, the queries of DETR. A child that is called
    somewhere, and read on some side path, is not meant.
    """
    return _uses(type(owner)).get(attribute) == {"weight"}  # type: ignore[arg-type]


@functools.cache
def _uses(owner: type[nn.Module]) -> dict[str, set[str]]:
    """What the methods of a class do with each attribute of ``self``: "weight" for reading it, "other" for the rest."""
    found: dict[str, set[str]] = {}
    for cls in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        for name, value in vars(cls).items():
            method = inspect.unwrap(getattr(value, "fget", None) or value) if name not in _SET_UP else None
            if isinstance(method, types.FunctionType):
                for attribute, use in _uses_in(method.__code__):
                    found.setdefault(attribute, set()).add(use)
    return found


@functools.cache  # most methods are those of one base of all models
def _uses_in(code: types.CodeType) -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found |= _uses_in(const)
    steps = list(dis.get_instructions(code))
    for function, before, here, after in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        if here.opname.startswith("LOAD") and _loads_self(before) and function.argval != "isinstance":
            reads = after.opname == "LOAD_ATTR" and after.argval in ("weight", "bias")
            found.add((str(here.argval), "weight" if reads else "other"))
    return frozenset(found)


def _loads_self(instruction: dis.Instruction) -> bool:
    """Python 3.13 loads two locals at once."""
    last = instruction.argval[-1:] if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return instruction.opname in _LOADING and last == ("self",)


@functools.cache
def takes_past_names(source: type[nn.Module]) -> bool:
    """Return whether the forward, or a method of its own class that it uses, goes by ``self.parameters()`` or the like.

    Asking such a Parameter for its device or dtype does no harm.
    """
    methods = {
        name: inspect.unwrap(getattr(value, "fget", None) or value)
        for cls in reversed(source.__mro__[: source.__mro__.index(nn.Module)])
        for name, value in vars(cls).items()
        if callable(value) or isinstance(value, property)
    }
    codes = {name: method.__code__ for name, method in methods.items() if isinstance(method, types.FunctionType)}
    todo, seen = ["forward"], set[str]()
    while todo:
        name = todo.pop()
        if name in codes and name not in seen:
            seen.add(name)
            found = _names(codes[name])
            if any(a in _PAST and b not in ("device", "dtype") for a, b in zip(found, [*found[1:], ""], strict=True)):
                return True
            todo += found
    return False


def _names(code: types.CodeType) -> list[str]:
    """Every name that the code, or a function inside it, uses, in order."""
    own = [str(step.argval) for step in dis.get_instructions(code) if step.opname in _NAMING]
    return own + [name for inner in code.co_consts if isinstance(inner, types.CodeType) for name in _names(inner)]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the source class: the class itself is made on demand and has no importable name."""
    return _rebuild, (type(self).torch_class,), self.__getstate__()  # type: ignore[attr-defined, no-untyped-call]


def _rebuild(source: type[nn.Module]) -> nn.Module:
    kind = _cooperative(source) or _rms_norm(source)  # type: ignore[arg-type]
    return kind.__new__(kind)
