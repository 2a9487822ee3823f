"""Leaving the default random generators as they were, without putting back what another thread has moved on.

The generators belong to all threads. Put back under another thread's feet, they would give its training the same noise
again and again; so they stay where they are when it is seen to train, which is the lesser evil.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .snapshot import all_equal, rng_state, set_rng_state

_draws: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_taken: Counter[int] = Counter()
_COMPUTING = ("torch.nn.", "torch.autograd", "torch.optim", "torch._tensor")


def note_draw() -> None:
    """A training draw takes its seed from the default generator, in this thread."""
    _taken[threading.get_ident()] += 1


@contextlib.contextmanager
def left_alone(model: nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """Afterwards the generators are as before, if it was ``model`` that moved them: most models draw nothing.

    Args:
        model: which is called inside.
        call: calls it once more; its answer is that of the model for as long as it lives.
    """
    before, others = rng_state(), _Others()
    try:
        yield
    except BaseException:
        if threading.active_count() == 1:
            set_rng_state(before)
        raise
    if not all_equal(before, rng_state()) and is_drawing(model, call) and not others.have_drawn():
        set_rng_state(before)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leaves Python's, NumPy's and torch's default generators (CPU and every used GPU) as it found them.

    Of several threads that are inside at once, the last one puts back what the first one found; none does so where
    another thread has drawn numbers of its own.
    """
    global _found, _others
    own, thread = _states(), threading.get_ident()
    with _lock:
        if not _inside:
            _found, _others = own, _Others()
        _inside.append(thread)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(thread)
            is_last = set(_inside) <= {thread}
            if is_last and not _others.have_drawn():
                _put_back(own if _inside else _found)


class _Others:
    """Whether threads but this one, and but those inside `preserved`, draw from the default generators meanwhile.

    Bayesian models tell; of others it is seen whether they compute at the beginning or at the end.
    """

    def __init__(self) -> None:
        self._before, self._computed = _taken.copy(), _compute_elsewhere()

    def have_drawn(self) -> bool:
        own = threading.get_ident()
        taken = any(count > self._before[thread] for thread, count in _taken.copy().items() if thread != own)
        return taken or self._computed or _compute_elsewhere()


def _compute_elsewhere() -> bool:
    if threading.active_count() == 1:
        return False
    busy = {threading.get_ident(), *_inside}
    return any(_computes(frame) for thread, frame in sys._current_frames().items() if thread not in busy)


def _computes(frame: FrameType | None) -> bool:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(_COMPUTING):
            return True
        frame = frame.f_back
    return False


_lock = threading.Lock()
_inside: list[int] = []
_found: Any = None
_others = _Others()


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
            names = [argument.name for argument in func._schema.arguments]
            defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
            given = defaults | dict(zip(names, args, strict=False)) | kwargs  # what has its default is not handed on
            self.has_drawn |= given.get("dropout_p", 1.0) != 0.0 and given.get("train", True) is not False
        return func(*args, **kwargs)
