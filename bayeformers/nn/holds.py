"""Draws that a caller holds: the caller sees them, and what it starts (threads, tasks); other callers do not.

A `with` of one thread must not change what another one computes, so a held draw is no attribute that is set and put
back: it is an entry in the layer's list, which counts for those in whose context it was opened.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from .reading import MEAN

Held = Any
"""A `Draw`, or `MEAN`."""


class Hold:
    """One draw held by one caller.

    Attributes:
        draw: what is held.
        is_open: until the caller's `with` ends.
        is_for_all: whether every thread sees it: set straight on a layer, or copied with it.
    """

    def __init__(self, draw: Held, *, is_for_all: bool = False) -> None:
        self.draw, self.is_for_all, self.is_open = draw, is_for_all, True

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Hold, is_for_all=True), (self.draw,)  # whoever opened it stays behind


class HasHolds(Protocol):
    """A layer whose draw can be held."""

    _holds: tuple[Hold, ...]


_mine: ContextVar[tuple[Hold, ...]] = ContextVar("bayeformers_holds", default=())
_lock = threading.RLock()
_INHERITED = "_bayeformers_holds"


@contextlib.contextmanager
def holding(layers: Iterable[HasHolds], draw: Held) -> Iterator[None]:
    """``layers`` hold ``draw`` for whoever runs inside: the innermost counts, in whatever order they are closed."""
    hold, layers = Hold(draw), list(layers)
    try:
        with _lock:
            _watch_threads(hold)
            for layer in layers:
                vars(layer)["_holds"] = (*layer._holds, hold)
        _mine.set((*_mine.get(), hold))
        yield
    finally:
        hold.is_open = False  # decides; the rest tidies up
        _mine.set(_open(_mine.get()))
        with _lock:
            for layer in layers:
                if "_holds" in vars(layer):  # else it was made deterministic inside
                    vars(layer)["_holds"] = _open(layer._holds)
            _unwatch_threads(hold)


def active(holds: tuple[Hold, ...], is_recorded: Callable[[], bool]) -> Held | None:
    """Return what the running code holds of a layer's ``holds``; None: nothing.

    Args:
        holds: of the layer, the innermost last.
        is_recorded: in a thread of autograd, whether a training forward is recomputed.

    RuntimeError is raised where autograd recomputes a layer in a thread of its own while callers hold different draws.
    """
    mine = _mine.get()
    for hold in reversed(holds):
        if hold.is_open and (hold.is_for_all or hold in mine):
            return hold.draw
    thread = threading.current_thread()
    inherited = vars(thread).get(_INHERITED, ())
    for hold in reversed(holds):
        if hold.is_open and hold in inherited:
            return hold.draw
    if isinstance(thread, threading._DummyThread) and torch._C._current_graph_task_id() != -1:  # on a GPU
        return None if is_recorded() else _of_anyone(holds)
    return None


def _of_anyone(holds: tuple[Hold, ...]) -> Held | None:
    """Autograd's worker knows no caller: what they all hold."""
    draws = [hold.draw for hold in holds if hold.is_open]
    if len({(getattr(draw, "seed", MEAN), getattr(draw, "index", 0)) for draw in draws}) > 1:
        raise RuntimeError(
            "A layer is recomputed in backward while several threads hold different draws of it, and it cannot be told "
            "which is meant: let one thread at a time go backward inside `with fixed_draw(model, index)`."
        )
    return draws[0] if draws else None


def _open(holds: tuple[Hold, ...]) -> tuple[Hold, ...]:
    return tuple(hold for hold in holds if hold.is_open)


# -- threads ----------------------------------------------------------------------------------------------------------
# Python does not tell which thread started which, nor does a new one take the context along (tasks do). So while some
# draw is held, a thread that is started notes what its starter holds.

_watching: set[Hold] = set()
_watched: list[tuple[Callable[..., None], Callable[..., None]]] = []


def _watch_threads(hold: Hold) -> None:
    _watching.add(hold)
    if _watched:
        return
    start = threading.Thread.start

    @functools.wraps(start)
    def noting(self: threading.Thread) -> None:
        held = _open((*vars(threading.current_thread()).get(_INHERITED, ()), *_mine.get()))
        if held:
            vars(self)[_INHERITED] = held
        start(self)

    _watched.append((noting, start))
    threading.Thread.start = noting  # type: ignore[method-assign]


def _unwatch_threads(hold: Hold) -> None:
    _watching.discard(hold)
    if not _watching and _watched:
        noting, start = _watched.pop()
        if threading.Thread.start is noting:  # else somebody wrapped it since: it stays, and notes nothing
            threading.Thread.start = start  # type: ignore[method-assign]
