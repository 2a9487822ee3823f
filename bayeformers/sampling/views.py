"""A private view of a model: its modules anew, around the same tensors.

Prediction sets modes, holds draws, moves weights, wraps forwards and adds hooks. On the model itself each of these
would be seen by every other thread, and what is put back from a copy may by then be another's. On a view nobody sees
them, and nothing needs to be put back. A model that is more than its modules (compiled, sharded, scripted, or with
functions that hold on to its modules) is used itself, by one prediction at a time.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..processes.dtensors import reshard
from .dora import check_no_cached_norms

T = TypeVar("T")

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_TORCH = frozenset(vars(nn.Module()))
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type, Tensor}
    | {types.BuiltinFunctionType, nn.Parameter, range, slice}
)
_CONTAINERS = (dict, OrderedDict, list, tuple, set, frozenset)
_DEPTH = 4
_OPAQUE = {
    "DataParallel", "DeepSpeedEngine", "DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel",
    "OptimizedModule", "ScriptModule",
}  # fmt: skip

LEFT_OUT = "is_left_out_of_views"
"""A hook with this attribute is not taken along."""
SHARED = "is_shared_by_views"
"""An attribute of a module whose class has this attribute is no part of its computation: it is taken as it is."""

INERT = "inert_in_views"
"""A module's class may name here attributes that reach no module."""

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_lent: WeakSet[nn.Module] = WeakSet()
"""Models into which the draws of a posterior are written."""
_making = threading.Lock()
_unwrapped: ContextVar[tuple[nn.Module, ...]] = ContextVar("bayeformers_unwrapped", default=())
_ORIGINAL = "_original_forward"
_ADDED = ("_forward_hooks", "_forward_pre_hooks")
"""Hooks that a forward may add, as transformers adds recorders of hidden states: the view has its own."""
_FORWARD_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
)  # fmt: skip


@dataclass(eq=False)
class View:
    """What a prediction works on.

    Attributes:
        origin: the model.
        model: its view, or itself.
        modules: by the id of a module of the model its counterpart in a view.
        tensors: by the id of a Parameter of the model what a view has in its place.
        kept: what its user finds out about it once.
    """

    origin: nn.Module
    model: nn.Module
    modules: Mapping[int, nn.Module] = field(default_factory=dict)
    tensors: Mapping[int, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def is_private(self) -> bool:
        """Whether it is a view, which nobody else knows."""
        return self.model is not self.origin

    def module(self, module: nn.Module) -> nn.Module:
        """The view's counterpart of a module of the model; the module itself where it has none."""
        return self.modules.get(id(module), module)

    def hookable(self, module: nn.Module) -> nn.Module:
        """That counterpart, with lists of forward hooks of its own; until then they are the module's."""
        counterpart = self.module(module)
        if self.is_private:
            own = vars(counterpart)
            own.update({name: OrderedDict(own[name]) for name in _FORWARD_HOOKS})
        return counterpart

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the view has in place of a Parameter of the model."""
        counterpart: Any = self.tensors.get(id(parameter), parameter)
        return counterpart  # type: ignore[no-any-return]


@contextlib.contextmanager
def viewed(
    model: nn.Module,
    replaced: Mapping[int, nn.Parameter] | None = None,
    *,
    training: bool | None = False,
    is_private: bool = True,
) -> Iterator[View]:
    """A view of ``model``, or where it can have none the model itself, for this caller alone until exit.

    Args:
        model: of which.
        replaced: by the id of a Parameter what a private view has in its place; the model itself keeps its own.
        training: mode of all modules inside; None: each its own.
        is_private: False for the model itself in any case.

    Yields:
        The view.
    """
    view = private_view(model, replaced, training=training) if is_private else None
    with itself(model, training=training) if view is None else contextlib.nullcontext(view) as whole:
        yield whole


@contextlib.contextmanager
def itself(model: nn.Module, *, training: bool | None = False) -> Iterator[View]:
    """The model itself, in this mode, for this caller alone until exit."""
    own = vars(model)
    wrapped, original = own.get("forward"), own.get(_ORIGINAL)
    is_unwrapped = wrapped is not None and original is not None and _is_unwrapped(model)
    with alone(model):
        changed = [] if training is None else [module for module in model.modules() if module.training != training]
        try:
            for module in changed:
                module.training = not module.training
            if is_unwrapped:
                own["forward"] = original
            yield View(model, model)
        finally:
            if is_unwrapped:
                own["forward"] = wrapped
            for module in changed:
                module.training = not training


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """One caller at a time, who may nest: for what has to change the model itself."""
    check_no_cached_norms(model)
    with _making:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        reshard(model)  # what FSDP2 left whole after a forward is a copy, which would stand for the weights themselves
        try:
            yield
        finally:
            reshard(model)


def lend(model: nn.Module) -> None:
    """Predictions may write draws into the model itself from now on: those on views wait for them."""
    with _making:
        _lent.add(model)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model's own weights stand in it until exit: a view reads them, and another posterior's draw may be there."""
    with alone(model) if model in _lent else contextlib.nullcontext():
        yield


def private_view(
    model: nn.Module, replaced: Mapping[int, nn.Parameter] | None = None, *, training: bool | None = False
) -> View | None:
    """Return the view of :func:`viewed`, or None where there can be none.

    Args:
        model: the model to see anew.
        replaced: by the id of a Parameter what the view has in its place.
        training: the mode of all modules inside; None: each its own.
    """
    check_no_cached_norms(model)
    tensors: dict[int, Tensor] = dict(replaced or {})
    try:
        modules = _Copying(model, tensors, training).run()
    except _NoView:
        return None
    return View(model, modules[id(model)], modules, tensors)


@contextlib.contextmanager
def unwrapped_forward(model: nn.Module) -> Iterator[None]:
    """Views of ``model`` that this caller makes inside are without what accelerate wraps its ``forward`` in."""
    token = _unwrapped.set((*_unwrapped.get(), model))
    try:
        yield
    finally:
        _unwrapped.reset(token)


def _is_unwrapped(model: nn.Module) -> bool:
    return any(one is model for one in _unwrapped.get())


class _NoView(Exception):
    """This model is more than its modules."""


class _Copying:
    """One walk over a model."""

    def __init__(self, model: nn.Module, tensors: dict[int, Tensor], training: bool | None) -> None:
        self._originals, self._tensors, self._training = modules_of(model), tensors, training
        self._made: dict[int, nn.Module] = {}
        self._known: dict[int, Any] = {}
        self._in_hook = False

    def run(self) -> dict[int, nn.Module]:
        made = self._made
        for module in self._originals:
            kind = type(module)
            if _is_opaque(kind) or module._compiled_call_impl is not None:
                raise _NoView
            made[id(module)] = object.__new__(kind)
        for module in self._originals:
            self._fill(vars(made[id(module)]), vars(module), _inert_names(type(module)))
            if _ORIGINAL in vars(module) and _is_unwrapped(module):
                vars(made[id(module)])["forward"] = vars(made[id(module)])[_ORIGINAL]
        return made

    def _fill(self, view: dict[str, Any], state: dict[str, Any], inert: frozenset[str]) -> None:
        view.update(state)
        made = self._made
        view["_modules"] = {name: None if m is None else made[id(m)] for name, m in state["_modules"].items()}
        for name in ("_parameters", "_buffers"):
            if type(state[name]) not in (dict, OrderedDict):  # DeepSpeed gathers what it reads there
                raise _NoView
            view[name] = state[name].copy()
        if self._tensors:
            own = view["_parameters"]
            for name, parameter in own.items():
                if id(parameter) in self._tensors:
                    own[name] = self._tensors[id(parameter)]
        for name in _HOOKS:
            if state[name]:
                view[name] = self._hooks(state[name])
            elif name in _ADDED:
                view[name] = OrderedDict()
        if self._training is not None:
            view["training"] = self._training
        for name in state.keys() - inert:
            if not _is_inert(type(state[name])):
                view[name] = self._copied(state[name])

    def _hooks(self, hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
        kept = {key: hook for key, hook in hooks.items() if not getattr(hook, LEFT_OUT, False)}
        self._in_hook = True
        found = OrderedDict((key, self._copied(hook)) for key, hook in kept.items())
        self._in_hook = False
        return found

    def _copied(self, value: Any, depth: int = _DEPTH) -> Any:
        """``value`` itself unless it reaches a module, or a Parameter that is replaced."""
        if isinstance(value, Tensor):
            return self._tensors.get(id(value), value)
        if _is_inert(type(value)) or depth == 0:
            return value
        if id(value) not in self._known:
            self._known[id(value)] = value  # while it is looked at: it may hold itself
            self._known[id(value)] = self._of(value, depth - 1)
        return self._known[id(value)]

    def _of(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            return self._of_module(value)
        if isinstance(value, types.MethodType):
            owner = self._copied(value.__self__, depth)
            if owner is value.__self__:
                return value
            if isinstance(value.__func__, types.FunctionType):  # trl's fused head calls the forward of its closure
                self._check_function(value.__func__, depth)
            return types.MethodType(value.__func__, owner)
        if isinstance(value, _CONTAINERS):
            return self._of_container(value, depth)
        if isinstance(value, functools.partial):
            return self._of_partial(value, depth)
        if isinstance(value, weakref.ReferenceType):
            target = value()
            found = self._copied(target, depth)
            return value if found is target else weakref.ref(found)
        if isinstance(value, types.FunctionType):
            self._check_function(value, depth)
            return value
        return self._of_object(value, depth)

    def _of_module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._made:
            return self._made[id(module)]
        if any(id(inner) in self._made for inner in module.modules()):  # a module beside the tree, around parts of it
            raise _NoView
        return module

    def _of_container(self, value: Any, depth: int) -> Any:
        kind = type(value)
        items = list(value.values()) if isinstance(value, dict) else list(value)
        copies = [self._copied(item, depth) for item in items]
        if all(new is old for new, old in zip(copies, items, strict=True)):
            return value
        if hasattr(kind, "_make"):
            return kind._make(copies)
        if kind not in _CONTAINERS:
            raise _NoView
        return kind(zip(value, copies, strict=True)) if isinstance(value, dict) else kind(copies)

    def _of_partial(self, value: functools.partial[Any], depth: int) -> Any:
        parts = (value.func, value.args, value.keywords, vars(value))
        copies = self._of_container(parts, depth)
        if copies is parts:
            return value
        func, args, keywords, own = copies
        partial = functools.partial(func, *args, **keywords)
        vars(partial).update(own)
        return partial

    def _check_function(self, function: types.FunctionType, depth: int) -> None:
        """Nobody can tell which of its closures' contents a function may change: it stays as it is, or the model."""
        held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        held += [*(function.__defaults__ or ()), *vars(function).values()]
        if self._of_container(held, depth) is not held:
            raise _NoView

    def _of_object(self, value: Any, depth: int) -> Any:
        """Such as a helper that calls its module's children. A hook's owner is to be told: it is not copied."""
        if not hasattr(value, "__dict__"):
            return value
        own = self._copied(vars(value), depth)
        if own is vars(value):
            return value
        if self._in_hook:
            raise _NoView
        try:
            found = object.__new__(type(value))
        except TypeError as error:
            raise _NoView from error
        vars(found).update(own)
        return found


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As ``list(model.modules())``, which makes all their names too."""
    found, waiting = dict[int, nn.Module](), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def _once(told: Callable[[type], T]) -> Callable[[type], T]:
    """Asked once for each class, which mypy takes for unhashable."""
    return functools.cache(told)


@_once
def _is_opaque(kind: type) -> bool:
    return any(base.__name__ in _OPAQUE for base in kind.__mro__)


@_once
def _is_inert(kind: type) -> bool:
    """Whether what is of this class reaches no module that a forward would use."""
    is_plain = kind in _PLAIN or issubclass(kind, type | types.ModuleType) or kind.__name__.endswith("Config")
    return (is_plain and not issubclass(kind, Tensor)) or getattr(kind, SHARED, False)


@_once
def _inert_names(kind: type) -> frozenset[str]:
    return _TORCH | getattr(kind, INERT, frozenset())
