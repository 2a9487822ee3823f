"""The state of the default random generators: read, compared, and put back unless another thread has moved it on.

The generators belong to all threads. Put back under another thread's feet, they would give its training the same noise
again and again; so they stay where they are when it is seen to train, which is the lesser evil.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_draws: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_taken: Counter[int] = Counter()
_THREAD_CLOCK = 6  # the kernel's clock of one thread's processor time, CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED
_IDLE_SECONDS, _IDLE_SHARE = 1e-3, 2e-3  # what a monitor or a heartbeat that wakes now and then may use


def rng_state() -> list[Tensor]:
    """State of the default generators of the CPU and of every CUDA device in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def set_rng_state(states: Sequence[Tensor]) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal, element by element."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def note_draw() -> None:
    """A training draw takes its seed from the default generator, in this thread."""
    _taken[threading.get_ident()] += 1


@contextlib.contextmanager
def left_alone(model: nn.Module, call: Callable[[], Any]) -> Iterator[None]:
    """Afterwards torch's generators are as before, if it was ``model`` that moved them: most models draw nothing.

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
    """Leave Python's, NumPy's and torch's default generators (CPU and every used GPU) as they were found.

    Of several threads that are inside at once, the last one puts back what the first one found; none does so where
    another thread has drawn numbers of its own.
    """
    global _first, _others
    entered, thread = (random.getstate(), np.random.get_state(), rng_state()), threading.current_thread()
    with _lock:
        if not _inside:
            _first, _others = entered, _Others()
        _inside.append(thread)
    start, sheltered = time.thread_time(), _sheltered.get(thread, 0.0)
    try:
        yield
    finally:
        with _lock:
            _sheltered[thread] = sheltered + time.thread_time() - start  # nested blocks count once
            _inside.remove(thread)
            is_last = set(_inside) <= {thread}
            if is_last and not _others.have_drawn():
                python, numpy, default = entered if _inside else _first
                random.setstate(python)
                np.random.set_state(numpy)
                set_rng_state(default)


class _Others:
    """Whether threads but this one, and but those inside `preserved`, draw from the default generators meanwhile.

    Bayesian models tell; of others it is seen how long they compute. A thread that has ended will not miss its noise.
    """

    def __init__(self) -> None:
        self._taken, self._spent, self._start = _taken.copy(), _spent(), time.monotonic()

    def have_drawn(self) -> bool:
        own = threading.get_ident()
        if any(count > self._taken[thread] for thread, count in _taken.copy().items() if thread != own):
            return True
        allowed = _IDLE_SECONDS + _IDLE_SHARE * (time.monotonic() - self._start)
        return any(
            spent == math.inf or spent - self._spent.get(thread, 0.0) > allowed
            for thread, spent in _spent().items()
            if thread.ident != own and thread not in _inside
        )


def _spent() -> dict[threading.Thread, float]:
    """Processor seconds of every thread outside of `preserved`; untold by the system, endless for all but daemons."""
    # no thread's frames are looked at: in Python 3.11 that was seen to give freed values, and to wait for ever
    if threading.active_count() == 1:
        return {}
    found = dict[threading.Thread, float]()
    for thread in threading.enumerate():
        # autograd's threads are not Python's own, and work for the one that calls `backward`
        helps = isinstance(thread, threading._DummyThread) or thread.name.endswith("(_pin_memory_loop)")
        if helps or thread.native_id is None:
            continue
        if sys.platform != "linux":
            found[thread] = 0.0 if thread.daemon else math.inf
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            found[thread] = time.clock_gettime(~thread.native_id << 3 | _THREAD_CLOCK) - _sheltered.get(thread, 0.0)
    return found


_lock = threading.Lock()
_inside: list[threading.Thread] = []
_sheltered: WeakKeyDictionary[threading.Thread, float] = WeakKeyDictionary()
_first: Any = None
_others = _Others()


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
            values = defaults | dict(zip(names, args, strict=False)) | kwargs  # what has its default is not handed on
            self.has_drawn |= values.get("dropout_p", 1.0) != 0.0 and values.get("train", True) is not False
        return func(*args, **kwargs)
