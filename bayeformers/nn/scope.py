"""The draws of one model's forwards: taken when a training forward begins, found again when a part is recomputed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from ..sampling.random_state import note_draw
from .noise import Draw, TracedDraw, noise_key

_REMEMBERED = 4096
_UNTOLD = (
    "A Bayesian layer is recomputed in backward and its draw cannot be told: keep `preserve_rng_state=True` in "
    "activation checkpointing, or run one forward per backward."
)


class _Forwards:
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


class DrawScope:
    """The training draws of one model: one per forward of the whole model, shared by all its layers.

    Only a seed is taken from torch's default generator, when a forward begins; the noise itself is stateless. So
    `torch.manual_seed` and a Trainer's saved random state reproduce it, ranks differ, and recomputation under
    activation checkpointing finds its draw again: by the generator's state, which checkpointing restores and which no
    two forwards of one thread share. Each thread's forwards have draws of their own.
    """

    is_shared_by_views = True

    def __init__(self) -> None:
        self.traced: TracedDraw | None = None
        self._depth = 0  # of traced forwards
        self._local = threading.local()
        self._threads: weakref.WeakSet[_Forwards] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.said: set[str] = set()
        self.handed: set[str] = set()  # what compiled graphs read of held draws
        self.drawn: set[str] | None = None  # the names of the tensors that are drawn, while somebody asks

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a model starts without draws in flight

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def running(self) -> Draw | None:
        """The draw of this thread's running forward."""
        return self._forwards().running

    @running.setter
    def running(self, draw: Draw | None) -> None:
        self._forwards().running = draw

    def _forwards(self) -> _Forwards:
        """This thread's, without those that were interrupted."""
        forwards: _Forwards | None = getattr(self._local, "forwards", None)
        if forwards is None:
            forwards = self._local.forwards = _Forwards()
            with self._lock:
                self._threads.add(forwards)
        forwards.close_interrupted()
        return forwards

    def enter(self, training: bool, frame: FrameType | None = None) -> bool:
        """Return whether the forward of the model that begins takes a new draw; nested ones belong to the outermost.

        ``frame``: ends when the forward does, in whatever way; None where the caller calls `exit` in any case.
        """
        if torch.compiler.is_compiling():
            self._depth += 1
            self.traced = self.traced or TracedDraw()
            return False
        forwards = self._forwards()
        forwards.frames.append(frame)
        if training and (len(forwards.frames) == 1 or forwards.running is None):
            forwards.running = self._new_draw(forwards)
            return True
        return False

    def exit(self, frame: FrameType | None = None) -> None:
        """The forward that began with this ``frame`` ends."""
        if torch.compiler.is_compiling():
            self._depth = max(self._depth - 1, 0)
            self.traced = self.traced if self._depth else None
            return
        forwards = self._forwards()  # torch calls its hooks after an Exception from outside of that frame
        if frame is None or frame in forwards.frames[-1:]:
            del forwards.frames[-1:]
        forwards.close_interrupted()
        if not forwards.frames:
            forwards.running = None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All forwards inside are one."""
        forwards = self._forwards()
        count, running = len(forwards.frames), forwards.running
        self.enter(training=True)
        try:
            yield
        finally:
            del forwards.frames[count:]
            forwards.running = running

    @property
    def is_running(self) -> bool:
        """Whether a forward runs, or a part of one is recomputed in backward."""
        if torch.compiler.is_compiling():
            return self.traced is not None
        return self.running is not None or torch._C._current_graph_task_id() != -1

    def begin_part(self) -> Draw | TracedDraw | None:
        """A part runs forward, perhaps on its own: it has one draw. Returns what `end_part` restores."""
        if torch.compiler.is_compiling():
            outer, self.traced = self.traced, self.traced or TracedDraw()
            return outer
        before, self.running = self.running, self.training_draw()  # type: ignore[assignment]
        return before

    def end_part(self, outer: Draw | TracedDraw | None) -> None:
        """The part's forward ends."""
        if torch.compiler.is_compiling():
            self.traced = outer if isinstance(outer, TracedDraw) else None
        else:
            self.running = outer  # type: ignore[assignment]

    def training_draw(self) -> Draw | TracedDraw:
        """The draw of the running forward; of the recomputed one during backward; else one for this call alone."""
        if torch.compiler.is_compiling():
            return self.traced or TracedDraw()
        forwards = self._forwards()
        running = forwards.running
        if running is None and torch._C._current_graph_task_id() != -1:
            return self._recomputed()
        state = _random_state()
        draw = self._new_draw(forwards) if running is None else running
        forwards.seen[state] = draw, running is None
        if len(forwards.seen) > _REMEMBERED:
            forwards.seen.popitem(last=False)
        return draw

    def sampling_key(self) -> Draw:
        """The draw whose noise a sampled KL uses: that of the latest forward, so that its parts share one."""
        forwards = self._forwards()
        return forwards.running or forwards.latest or Draw(0, keep=False)

    def is_recorded(self) -> bool:
        """Whether some thread's training forward had the present random state."""
        state = _random_state()
        return any(state in forwards.seen for forwards in self._all())

    def _recomputed(self) -> Draw:
        """On a GPU, autograd recomputes in a thread of its own: then the draw is that of whichever forward fits."""
        own: _Forwards = self._local.forwards
        everyone = self._all()
        if len(everyone) > 1:  # who move the random state under each other's feet
            draw = own.of_backward()
            if draw is not None:
                return draw
        return self._recorded([own] if _random_state() in own.seen else everyone)

    def _recorded(self, candidates: list[_Forwards]) -> Draw:
        state = _random_state()
        knowing = [one for one in candidates if state in one.seen]
        if not knowing:
            draw = self._only_forward()
        else:
            draw, is_own = knowing[0].seen[state]
            if any(one.seen[state][0] is not draw for one in knowing):
                raise RuntimeError(_UNTOLD)
            if is_own:
                _fresh_seed()  # the original call took a seed here: later dropout must find the same random state
        for one in knowing or self._all():
            one.unfinished = 0
        return draw

    def _only_forward(self) -> Draw:
        """The draw of the one forward that has not gone backward yet, or that there was."""
        known = [one for one in self._all() if one.unfinished] or [one for one in self._all() if one.latest]
        if len(known) != 1 or known[0].latest is None or known[0].unfinished > 1:
            raise RuntimeError(_UNTOLD)
        return known[0].latest

    def _all(self) -> list[_Forwards]:
        with self._lock:
            return list(self._threads)

    @staticmethod
    def _new_draw(forwards: _Forwards) -> Draw:
        draw = Draw(fresh_key(), keep=False)
        forwards.latest = draw
        if torch.is_grad_enabled():
            forwards.unfinished += 1
            forwards.pending = draw
        return draw


def fresh_key() -> int:
    """The seed of a training draw, from torch's default generator: ranks differ."""
    return noise_key(_fresh_seed(), _rank(), "training", version=2)


def _fresh_seed() -> int:
    note_draw()
    return int(torch.randint(2**62, ()).item())


def _random_state() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _is_executing(frame: FrameType) -> bool:
    try:
        frame.clear()  # of a frame that is over: its inputs, which we keep alive, are let go
    except RuntimeError:
        return True
    return False
