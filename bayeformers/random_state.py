"""Leaving the default random generators as they were, without putting back what another thread has moved on."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .snapshot import all_equal, rng_state, set_rng_state

_draws: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextlib.contextmanager
def left_alone(model: nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """Afterwards the generators are as before, if it was ``model`` that moved them: most models draw nothing.

    Args:
        model: which is called inside.
        call: calls it once more; its answer is that of the model for as long as it lives.
    """
    before = rng_state()
    try:
        yield
    except BaseException:
        if threading.active_count() == 1:
            set_rng_state(before)
        raise
    if not all_equal(before, rng_state()) and is_drawing(model, call):
        set_rng_state(before)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leaves Python's, NumPy's and torch's default generators (CPU and every used GPU) as it found them.

    Of several threads that are inside at once, the last one puts back what the first one found.
    """
    global _found
    own, thread = _states(), threading.get_ident()
    with _lock:
        if not _inside:
            _found = own
        _inside.append(thread)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(thread)
            if not _inside:
                _put_back(_found)
            elif set(_inside) == {thread}:
                _put_back(own)


_lock = threading.Lock()
_inside: list[int] = []
_found: Any = None


def _states() -> tuple[Any, Any, list[torch.Tensor]]:
    return random.getstate(), np.random.get_state(), rng_state()


def _put_back(states: tuple[Any, Any, list[torch.Tensor]]) -> None:
    python, numpy, default = states
    random.setstate(python)
    np.random.set_state(numpy)
    set_rng_state(default)


def is_drawing(model: nn.Module, call: Callable[[], Any]) -> bool:
    """Whether it was ``model`` that moved the generators: where there is another thread, that may have done it."""
    if threading.active_count() == 1:
        return True
    if model not in _draws:
        with _Watch() as watch:
            call()
        _draws[model] = watch.has_drawn
    return _draws[model]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whether this thread takes numbers from a default generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            given = {
                argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
            } | kwargs
            self.has_drawn |= given.get("dropout_p", 1.0) != 0.0 and given.get("train", True) is not False
        return func(*args, **kwargs)
