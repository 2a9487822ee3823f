"""What every example does around its work: take time, and say from the main process alone what it is doing."""

from __future__ import annotations

import time

from accelerate import PartialState


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 1)
        self._last = now


def say(text: str) -> None:
    """Print a line of its own, once, in however many processes."""
    if PartialState().is_main_process:
        print(f"\n{text}", flush=True)
