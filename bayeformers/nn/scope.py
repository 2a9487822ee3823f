"""The draws of one model's forwards: taken when a training forward begins, found again when a part is recomputed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch

from ..sampling.random_state import note_draw
from .forwards import Forwards
from .noise import noise_key
from .variational import Draw, TracedDraw


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
        self._threads: weakref.WeakSet[Forwards] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.said: set[str] = set()
        self.drawn: set[int] | None = None  # the ids of the scales that are drawn, while somebody asks

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy of a model starts without draws in flight

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def running(self) -> Draw | None:
        """The draw of this thread's running forward."""
        forwards = self._own
        forwards.close_interrupted()
        return forwards.running

    @running.setter
    def running(self, draw: Draw | None) -> None:
        self._own.running = draw

    @property
    def _own(self) -> Forwards:
        try:
            return self._local.forwards  # type: ignore[no-any-return]
        except AttributeError:
            forwards = self._local.forwards = Forwards()
            with self._lock:
                self._threads.add(forwards)
            return forwards

    def enter(self, training: bool, frame: FrameType | None = None) -> bool:
        """A forward of the model begins; nested ones belong to the outermost. Whether it takes a new draw.

        ``frame``: ends when the forward does, in whatever way; None where the caller calls `exit` in any case.
        """
        if torch.compiler.is_compiling():
            self._depth += 1
            self.traced = self.traced or TracedDraw()
            return False
        forwards = self._own
        forwards.close_interrupted()
        forwards.frames.append(frame)
        if training and (len(forwards.frames) == 1 or forwards.running is None):
            forwards.running = self._new_draw()
            return True
        return False

    def exit(self, frame: FrameType | None = None) -> None:
        """The forward that began with this ``frame`` ends."""
        if torch.compiler.is_compiling():
            self._depth = max(self._depth - 1, 0)
            self.traced = self.traced if self._depth else None
            return
        forwards = self._own
        if frame is None or frame in forwards.frames[-1:]:
            del forwards.frames[-1:]
        forwards.close_interrupted()  # torch calls its hooks after an Exception from outside of that frame
        if not forwards.frames:
            forwards.running = None

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All forwards inside are one."""
        forwards = self._own
        forwards.close_interrupted()
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

    def begin_part(self) -> Draw | None:
        """A part runs forward, perhaps on its own: it has one draw. Returns what `end_part` restores."""
        if torch.compiler.is_compiling():
            outer, self.traced = self.traced, self.traced or TracedDraw()
            return outer
        before, self.running = self.running, self.training_draw()
        return before

    def end_part(self, outer: Draw | None) -> None:
        """The part's forward ends."""
        if torch.compiler.is_compiling():
            self.traced = outer if isinstance(outer, TracedDraw) else None
        else:
            self.running = outer

    def training_draw(self) -> Draw:
        """The draw of the running forward; of the recomputed one during backward; else one for this call alone."""
        if torch.compiler.is_compiling():
            return self.traced or TracedDraw()
        running = self.running
        if running is None and torch._C._current_graph_task_id() != -1:
            return self._recomputed()
        state = _random_state()
        draw = self._new_draw() if running is None else running
        self._own.remember(state, draw, running is None)
        return draw

    def sampling_key(self) -> Draw:
        """The draw whose noise a sampled KL uses: that of the latest forward, so that its parts share one."""
        return self.running or self._own.latest or Draw(0, keep=False)

    def is_recorded(self) -> bool:
        """Whether some thread's training forward had the present random state."""
        state = _random_state()
        return any(state in forwards.seen for forwards in self._all())

    def _recomputed(self) -> Draw:
        """On a GPU, autograd recomputes in a thread of its own: then the draw is that of whichever forward fits."""
        own: Forwards | None = getattr(self._local, "forwards", None)
        everyone = self._all()
        if own is not None and len(everyone) > 1:  # who move the random state under each other's feet
            draw = own.of_backward()
            if draw is not None:
                return draw
        return self._recorded([own] if own is not None and _random_state() in own.seen else everyone)

    def _recorded(self, candidates: list[Forwards]) -> Draw:
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

    def _all(self) -> list[Forwards]:
        with self._lock:
            return list(self._threads)

    def _new_draw(self) -> Draw:
        draw, forwards = Draw(fresh_key(), keep=False), self._own
        forwards.latest = draw
        if torch.is_grad_enabled():
            forwards.unfinished += 1
            forwards.pending = draw
        return draw


_UNTOLD = (
    "A Bayesian layer is recomputed in backward and its draw cannot be told: keep `preserve_rng_state=True` in "
    "activation checkpointing, or run one forward per backward."
)


def _random_state() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def fresh_key() -> int:
    """The seed of a training draw, from torch's default generator: ranks differ."""
    return noise_key(_fresh_seed(), _rank(), "training")


def _fresh_seed() -> int:
    note_draw()
    return int(torch.randint(2**62, ()).item())


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
