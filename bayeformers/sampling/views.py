"""A private view of a model: its modules anew, around the same tensors.

Prediction sets modes, holds draws, moves weights, wraps forwards and adds hooks. On the model itself each of these
would be seen by every other thread, and what is put back from a copy may by then be another's. On a view nobody sees
them, and nothing needs to be put back. A model that is more than its modules (compiled, sharded, scripted, or with
functions that hold on to its modules) is used itself, by one prediction at a time.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

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
_making = threading.Lock()
_unwrapped: ContextVar[tuple[nn.Module, ...]] = ContextVar("bayeformers_unwrapped", default=())
_ORIGINAL = "_original_forward"
_ADDED = ("_forward_hooks", "_forward_pre_hooks")
"""Hooks that a forward may add, as transformers adds recorders of hidden states: the view has its own."""
_FORWARD_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
)  # fmt: skip


class View:
    """What a prediction works on.

    Attributes:
        origin: the model.
        model: its view, or itself.
        is_private: whether it is a view, which nobody else knows.
    """

    def __init__(self, origin: nn.Module, modules: Mapping[int, nn.Module], tensors: Mapping[int, Tensor]) -> None:
        self.origin, self.model = origin, modules.get(id(origin), origin)
        self._modules, self._tensors = modules, tensors
        self.is_private = bool(modules)
        self.kept: dict[str, Any] = {}  # what its user finds out about it once

    def module(self, module: nn.Module) -> nn.Module:
        """The view's counterpart of a module of the model; the module itself where it has none."""
        return self._modules.get(id(module), module)

    def hookable(self, module: nn.Module) -> nn.Module:
        """That counterpart, with lists of forward hooks of its own; until then they are the module's."""
        found = self.module(module)
        if self.is_private:
            own = vars(found)
            own.update({name: OrderedDict(own[name]) for name in _FORWARD_HOOKS})
        return found

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the view has in place of a Parameter of the model."""
        found: Any = self._tensors.get(id(parameter), parameter)
        return found  # type: ignore[no-any-return]


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
    """
    view = private_view(model, replaced, training=training) if is_private else None
    if view is not None:
        yield view
        return
    with itself(model, training=training) as view:
        yield view


@contextlib.contextmanager
def itself(model: nn.Module, *, training: bool | None = False) -> Iterator[View]:
    """The model itself, in this mode, for this caller alone until exit."""
    with alone(model), _in_mode(model, training), _unwrapped_itself(model):
        yield View(model, {}, {})


@contextlib.contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """One caller at a time, who may nest: for what has to change the model itself."""
    with _making:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


def private_view(
    model: nn.Module, replaced: Mapping[int, nn.Parameter] | None = None, *, training: bool | None = False
) -> View | None:
    """The view, or None where there can be none: see `viewed`."""
    tensors: dict[int, Tensor] = dict(replaced or {})
    try:
        modules = _Copying(model, tensors, training).run()
    except _NoView:
        return None
    return View(model, modules, tensors)


def copy_around(model: nn.Module, own: Iterable[nn.Parameter] = ()) -> nn.Module | None:
    """A copy, to be changed at will, whose Parameters share the memory of the model's, but for ``own`` ones.

    None where there can be no view. A posterior that the model carries is left out.
    """
    if private_view(model) is None:
        return None
    apart = {id(parameter) for parameter in own}
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        value = parameter.detach().clone() if id(parameter) in apart else parameter.detach()
        memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    carried = vars(model).get("posterior")
    if carried is not None:
        memo[id(carried)] = None
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, ValueError, RuntimeError):  # a lock, or what else has no copy
        return None


@contextlib.contextmanager
def unwrapped_forward(model: nn.Module) -> Iterator[None]:
    """Views of ``model`` that this caller makes inside are without what accelerate wraps its ``forward`` in."""
    token = _unwrapped.set((*_unwrapped.get(), model))
    try:
        yield
    finally:
        _unwrapped.reset(token)


@contextlib.contextmanager
def _unwrapped_itself(model: nn.Module) -> Iterator[None]:
    wrapped, original = vars(model).get("forward"), vars(model).get(_ORIGINAL)
    if wrapped is None or original is None or not _is_unwrapped(model):
        yield
        return
    vars(model)["forward"] = original
    try:
        yield
    finally:
        vars(model)["forward"] = wrapped


def _is_unwrapped(model: nn.Module) -> bool:
    return any(one is model for one in _unwrapped.get())


@contextlib.contextmanager
def _in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    changed = [] if training is None else [module for module in model.modules() if module.training != training]
    try:
        for module in changed:
            module.training = not module.training
        yield
    finally:
        for module in changed:
            module.training = not training


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
            return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
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
        if isinstance(value, dict):
            items = {key: self._copied(item, depth) for key, item in value.items()}
            if all(items[key] is item for key, item in value.items()):
                return value
            return self._rebuilt(kind, kind in _CONTAINERS, items)
        found = [self._copied(item, depth) for item in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        if hasattr(kind, "_make"):
            return kind._make(found)
        return self._rebuilt(kind, kind in _CONTAINERS, found)

    @staticmethod
    def _rebuilt(kind: Any, is_known: bool, content: Any) -> Any:
        if not is_known:
            raise _NoView
        return kind(content)

    def _of_partial(self, value: functools.partial[Any], depth: int) -> Any:
        parts = (value.func, value.args, value.keywords, vars(value))
        func, args, keywords, own = (self._copied(part, depth) for part in parts)
        if all(new is old for new, old in zip((func, args, keywords, own), parts, strict=True)):
            return value
        found = functools.partial(func, *args, **keywords)
        vars(found).update(own)
        return found

    def _check_function(self, function: types.FunctionType, depth: int) -> None:
        """Nobody can tell which of its closures' contents a function may change: it stays as it is, or the model."""
        held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        held += [*(function.__defaults__ or ()), *vars(function).values()]
        if any(self._copied(item, depth) is not item for item in held):
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


def _is_opaque(kind: type) -> bool:
    if kind not in _known_opaque:
        _known_opaque[kind] = any(base.__name__ in _OPAQUE for base in kind.__mro__)
    return _known_opaque[kind]


def _is_inert(kind: type) -> bool:
    """Whether what is of this class reaches no module that a forward would use."""
    if kind not in _known_inert:
        is_plain = kind in _PLAIN or issubclass(kind, type | types.ModuleType) or kind.__name__.endswith("Config")
        _known_inert[kind] = (is_plain and not issubclass(kind, Tensor)) or getattr(kind, SHARED, False)
    return _known_inert[kind]


def _inert_names(kind: type) -> frozenset[str]:
    if kind not in _known_names:
        _known_names[kind] = _TORCH | getattr(kind, INERT, frozenset())
    return _known_names[kind]


_known_names: dict[type, frozenset[str]] = {}
_known_opaque: dict[type, bool] = {}
_known_inert: dict[type, bool] = {}
