"""Runs checks one after the other, and writes a line before and after each: the process may be ended at any time."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .registry import CHECKS, Check
from .setup import Setup, Skipped
from .speed import free


def main(argv: list[str] | None = None) -> None:
    """Append to the file a line of JSON that says what there is, and one for every check that begins and that ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="of checks; all by default")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    setup = Setup(torch.device(args.device), args.tiny)
    # of a GPU; a CPU that runs the tests has other things to do
    limits = {check.name: check.seconds * (10 if setup.tiny else 1) for check in CHECKS.values()}
    write(args.file, checks=limits, machine=machine(setup))
    for name in args.names or limits:
        if name not in limits:
            sys.exit(f"{name!r} is no check; there are {', '.join(limits)}")
        write(args.file, name=name, status="running")
        start = time.monotonic()
        found = outcome(CHECKS[name], setup)
        write(args.file, name=name, seconds=round(time.monotonic() - start, 2), **found)
        if found.get("fatal"):
            sys.exit(1)  # CUDA answers nothing in this process any more


def outcome(check: Check, setup: Setup) -> dict[str, Any]:
    """Passed with its numbers, skipped with a reason, or failed with an error."""
    try:
        return {"status": "passed", "numbers": check.run(setup)}
    except Skipped as reason:
        return {"status": "skipped", "reason": str(reason)}
    except Exception as error:
        reason = "".join(traceback.format_exception(error))[-2000:]
        fatal = setup.is_cuda and "CUDA error" in str(error)
        return {"status": "failed", "reason": reason, "fatal": fatal}
    finally:
        torch._dynamo.reset()
        if setup.is_cuda:
            free()


def machine(setup: Setup) -> dict[str, Any]:
    """Where the numbers come from."""
    device = torch.cuda.get_device_name(setup.device) if setup.is_cuda else platform.machine()
    return {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "tiny": setup.tiny}


def write(file: Path, **line: Any) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
