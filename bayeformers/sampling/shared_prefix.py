"""Outputs that do not depend on the draw are computed once: a memo of module calls, shared by the passes of one batch.

A module without random weights that is called with the inputs of an earlier pass returns what it returned then. Every
reuse is checked first: the inputs (by identity, else bit by bit), all that the module reads besides them, and that
nothing changed a stored tensor in place. Whatever cannot be checked is computed again, so outputs are exactly those of
a plain loop.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .random_state import all_equal, rng_state
from .snapshot import (
    MAX_DEPTH,
    TORCH_ATTRIBUTES,
    Refused,
    flatten,
    module_state,
    rebuild,
    same_tensor,
    tensors_by_id,
    unchanged,
    versions,
)

Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """What one call depends on: the leaves of its arguments, their versions, and all else that the module reads."""

    inputs: list[Any]
    versions: list[int | None]
    state: list[Any]


@dataclass(frozen=True, eq=False)
class _Recording:
    """One call of one module: what it depended on, and what it returned."""

    before: _Snapshot
    output: Any
    leaves: list[Any]
    leaf_versions: list[int | None]


def _snapshot(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Snapshot | None:
    try:
        inputs, state = flatten((args, kwargs)), module_state(module)
    except Refused:
        return None
    return _Snapshot(inputs, versions(inputs), state)


class SharedPrefix:
    """While entered, ``model`` reuses outputs of its modules that cannot depend on ``random``; enter it once per pass.

    Args:
        model: in ``eval()`` mode, called under ``torch.no_grad()``.
        random: the Parameters whose values differ between passes, wherever they are used.
        max_bytes: cap on the tensors kept; a call beyond it is computed in every pass.

    Attributes:
        hits: calls answered from memory so far.
        recorded: calls remembered in the last pass.
    """

    def __init__(self, model: nn.Module, random: Iterable[nn.Parameter], max_bytes: int) -> None:
        self.hits = self.recorded = 0
        self._max_bytes, self._held = max_bytes, dict[int, int]()
        self._memo: dict[tuple[nn.Module, int], _Recording | None] = {}
        self._live: dict[int, Tensor] = {}  # remembered outputs by id
        self._patches = [(module, self._wrap(module, handle)) for module, handle in self._plan(model, random)]
        self._hidden: list[Any] = []
        self._begin_pass({})

    def __enter__(self) -> SharedPrefix:
        # Straight into __dict__: `nn.Module.__setattr__` costs ten times as much, for every module and pass.
        self._hidden = [vars(module).get("forward") for module, _ in self._patches]
        for module, forward in self._patches:
            vars(module)["forward"] = forward
        return self

    def __exit__(self, *exception: object) -> None:
        for (module, _), hidden in zip(self._patches, self._hidden, strict=True):
            if hidden is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = hidden

    def clear(self) -> None:
        """Forget every output: memory is held for one batch only."""
        self._memo, self._live, self._held = {}, {}, {}
        self._begin_pass({})

    def _begin_pass(self, inputs: dict[int, Tensor]) -> None:
        self.recorded = 0
        self._inputs = inputs
        self._calls: dict[nn.Module, int] = {}
        self._equal: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._after_random = self._inside_recording = False

    def _plan(self, model: nn.Module, random: Iterable[nn.Parameter]) -> Iterator[tuple[nn.Module, Forward]]:
        """Which modules are wrapped, and by what: the root, the owners of random weights, those free of them."""
        owners, above = random_modules(model, random)
        for module in model.modules():
            if module is model:
                yield module, self._root
            elif module in owners:
                yield module, self._random
            elif module not in above and type(module).forward is not nn.Module.forward:
                yield module, self._call

    @staticmethod
    def _wrap(module: nn.Module, handle: Forward) -> Forward:
        forward = module.forward

        @functools.wraps(forward)  # transformers inspects the signature
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return handle(module, forward, args, kwargs)

        return wrapper

    def _root(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = {key: tensor for value in (*args, *kwargs.values()) for key, tensor in tensors_by_id(value).items()}
        self._begin_pass(found)
        return forward(*args, **kwargs)

    def _random(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._after_random = True
        return forward(*args, **kwargs)

    def _call(self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._inside_recording:
            return forward(*args, **kwargs)
        index = self._calls.get(module, 0)  # a module may be called several times in a pass
        self._calls[module] = index + 1
        key = module, index
        if key in self._memo and self._memo[key] is None:  # given up: its children get their chance
            return forward(*args, **kwargs)
        recording, self._memo[key] = self._memo.get(key), None
        snapshot = _snapshot(module, args, kwargs)
        if recording is not None and snapshot is not None and self._still_holds(recording, snapshot):
            self._memo[key] = recording
            self.hits += 1
            return rebuild(recording.output)
        if recording is not None:
            self._forget(recording)
        elif snapshot is not None and (not self._after_random or self._is_known(snapshot.inputs)):
            return self._record(key, snapshot, lambda: forward(*args, **kwargs))
        return forward(*args, **kwargs)

    def _record(self, key: tuple[nn.Module, int], before: _Snapshot, compute: Callable[[], Any]) -> Any:
        rng = rng_state()
        self._inside_recording = True
        try:
            output = compute()
        finally:
            self._inside_recording = False
        try:
            leaves, state = flatten(output), module_state(key[0])
        except Refused:
            return output
        pure = versions(before.inputs) == before.versions and unchanged(before.state, state)
        if pure and all_equal(rng, rng_state()) and self._reserve(before.inputs, leaves):
            self._memo[key] = _Recording(before, rebuild(output), leaves, versions(leaves))
            self._live.update(tensors_by_id(leaves))
            self.recorded += 1
        return output

    def _still_holds(self, recording: _Recording, now: _Snapshot) -> bool:
        then = recording.before
        return (
            len(now.inputs) == len(then.inputs)
            and versions(recording.leaves) == recording.leaf_versions
            and all(map(self._same, then.inputs, then.versions, now.inputs))
            and unchanged(then.state, now.state)
        )

    def _same(self, then: Any, version: int | None, now: Any) -> bool:
        """A leaf of the recorded call, its version at that time, and the leaf now."""
        if not (isinstance(then, Tensor) and isinstance(now, Tensor)):
            return type(then) is type(now) and bool(then == now)
        if then._version != version:
            return False
        key = id(now), now._version
        if then is now or (key in self._equal and self._equal[key][0] is then):
            return True
        if not same_tensor(then, now):
            return False
        self._equal[key] = then, now  # masks are made anew in every pass and go to every layer: compare once
        return True

    def _is_known(self, inputs: list[Any]) -> bool:
        return all(id(leaf) in self._inputs or id(leaf) in self._live for leaf in inputs if isinstance(leaf, Tensor))

    def _forget(self, recording: _Recording) -> None:
        for leaf in recording.leaves:
            self._live.pop(id(leaf), None)

    def _reserve(self, *leaves: list[Any]) -> bool:
        storages = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaf in (leaf for group in leaves for leaf in group)
            if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and id(leaf) not in self._inputs
        }
        held = self._held | storages
        if sum(held.values()) > self._max_bytes:
            return False
        self._held = held
        return True


def random_modules(model: nn.Module, random: Iterable[nn.Parameter]) -> tuple[set[nn.Module], set[nn.Module]]:
    """Modules that own a random Parameter, and modules that own one or contain an owner."""
    chosen = {id(parameter) for parameter in random}
    owners = {module for module in model.modules() if any(id(p) in chosen for p in module._parameters.values())}
    return owners, {module for module in model.modules() if not owners.isdisjoint(module.modules())}


def hidden_reference(model: nn.Module, random: Iterable[nn.Parameter]) -> str | None:
    """Name of a module that is free of random weights, but reaches some past its registered children; None: no such."""
    # a module in a plain list, or behind a bound method, is not among `module.modules()`
    _, above = random_modules(model, random)
    for name, module in model.named_modules():
        if module not in above:
            values = [value for key, value in vars(module).items() if key not in TORCH_ATTRIBUTES]
            if any(_reaches(value, above) for value in values):
                return str(name)
    return None


def _reaches(value: Any, modules: set[nn.Module], depth: int = MAX_DEPTH) -> bool:
    if isinstance(value, nn.Module):
        return value in modules or not modules.isdisjoint(value.modules())
    if depth == 0:
        return False
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, functools.partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        inner = (value.__self__,)
    return any(_reaches(item, modules, depth - 1) for item in inner)
