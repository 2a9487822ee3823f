"""The forwards of one model that one thread runs or has run, and their training draws."""

from __future__ import annotations

from collections import OrderedDict
from types import FrameType

import torch

from .variational import Draw

_REMEMBERED = 4096


class Forwards:
    """One thread's forwards of one model.

    Attributes:
        frames: of the forwards that run, the outermost first; None of one that its caller closes in any case.
        running: their draw.
        latest: the last forward's.
        unfinished: how many forwards have not gone backward.
        pending: draw of the latest of them.
        seen: random state -> the draw that a layer took in it, and whether for itself alone.
    """

    def __init__(self) -> None:
        self.frames: list[FrameType | None] = []
        self.running: Draw | None = None
        self.latest: Draw | None = None
        self.pending: Draw | None = None
        self.unfinished = 0
        self._backward: tuple[int, Draw | None] = -1, None
        self.seen: OrderedDict[int, tuple[Draw, bool]] = OrderedDict()

    def remember(self, state: int, draw: Draw, own: bool) -> None:
        self.seen[state] = draw, own
        if len(self.seen) > _REMEMBERED:
            self.seen.popitem(last=False)

    def of_backward(self) -> Draw | None:
        """The draw of the one forward that this backward pass belongs to; None if it may be another."""
        task = torch._C._current_graph_task_id()
        if self._backward[0] != task:
            self._backward = task, self.pending if self.unfinished == 1 else None
            self.unfinished = 0
        return self._backward[1]

    def close_interrupted(self) -> None:
        """End the forwards whose frames are gone: after a KeyboardInterrupt torch calls no hook.

        Without forwards there is no running draw, but for one that `begin_part` set, whose module ends it.
        """
        had = len(self.frames)
        while self.frames and self.frames[-1] is not None and not _is_executing(self.frames[-1]):
            self.frames.pop()
            self.unfinished = max(self.unfinished - 1, 0)
        if had and not self.frames:
            self.running = None


def _is_executing(frame: FrameType) -> bool:
    try:
        frame.clear()  # of a frame that is over: its inputs, which we keep alive, are let go
    except RuntimeError:
        return True
    return False
