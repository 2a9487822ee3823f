"""What every example does around its work: take time, say from the main process alone what it is doing, and leave."""

from __future__ import annotations

import os
import sys
import time

import torch
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


def leave_process_group() -> None:
    """End a multi-process run together: torn down by the interpreter, gloo's threads abort one rank now and then."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
