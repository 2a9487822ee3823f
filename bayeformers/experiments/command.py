"""The command line of an experiment: defaults by the kind of data, all of them in --help, and errors in one line."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
import time
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from .arguments import check_smoothing

_USERS = "is_about_input"  # attribute of an exception that a wrong flag or file has caused: it needs no traceback


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Errors in here are about what the user gave: `run_command` prints them in one line, other callers get them."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        setattr(error, _USERS, True)
        raise


def run_command(main: Callable[[Sequence[str]], Any]) -> None:
    """Run ``main`` on the command line's arguments; an error about these is a line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError) as error:
        if not getattr(error, _USERS, False):
            raise
        print(f"{_program()}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    _leave_process_group()


def _leave_process_group() -> None:
    """End a multi-process run together: torn down by the interpreter, gloo's threads abort one rank now and then."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _program() -> str:
    """The command as it was called."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec is not None else sys.argv[0]


def look_ahead(argv: Sequence[str] | None, *flags: str, config: bool = False) -> Namespace:
    """Return the values of some flags before the others are read, because they decide the others' defaults.

    Args:
        argv: the command line; None for that of the process.
        flags: the names, without dashes. None is the value of those that are not given.
        config: whether ``--config`` names a JSON file of arguments, which then serve where the command line is silent.

    >>> look_ahead(["--task_name", "cola", "--seed", "3"], "task_name", "method")
    Namespace(task_name='cola', method=None)
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*flags, *(["config"] if config else [])):
        first.add_argument(f"--{flag}")
    known = first.parse_known_args(argv)[0]
    if config:
        stored = _read_config(known.config)
        for flag in flags:
            if getattr(known, flag) is None:
                setattr(known, flag, stored.get(flag))
    return known


class _DefaultsByKind(ArgumentDefaultsHelpFormatter):
    """Where a default depends on the data, all of its values."""

    def _get_help_string(self, action: Action) -> str | None:
        by_kind = getattr(action, "by_kind", None)
        if by_kind is None:
            return super()._get_help_string(action)
        shown = "; ".join(f"{kind}: {value}" for kind, value in by_kind.items())
        return f"{action.help} (default: {shown})".replace("%(default)s", "").replace("%", "%%")


class ExperimentParser(HfArgumentParser):
    """A parser of dataclasses whose defaults depend on the kind of data; its errors are one line, without the usage.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Data:
    ...     epochs: int = 1
    >>> parser = ExperimentParser([Data], {"digits": {"epochs": 30}, "other images": {"epochs": 20}}, "digits")
    >>> parser.parse([]), parser.parse(["--epochs", "5"])
    ((Data(epochs=30),), (Data(epochs=5),))
    """

    def __init__(
        self, groups: Sequence[Any], kinds: Mapping[str, Mapping[str, Any]] | None = None, chosen: str = "", **rest: Any
    ) -> None:
        """Read the dataclasses ``groups``; ``kinds`` are other defaults by kind of data, those of ``chosen`` count."""
        super().__init__(groups, allow_abbrev=False, formatter_class=_DefaultsByKind, **rest)
        if kinds:
            self.show_defaults(kinds)
            self.set_defaults(**kinds[chosen])

    def show_defaults(self, kinds: Mapping[str, Mapping[str, Any]]) -> None:
        """Let --help show each kind's default where they differ, before `set_defaults` picks one."""
        for action in self._actions:
            values = {kind: table.get(action.dest, action.default) for kind, table in kinds.items()}
            if SUPPRESS not in values.values() and len({repr(value) for value in values.values()}) > 1:
                action.by_kind = values  # type: ignore[attr-defined]

    def error(self, message: str) -> NoReturn:
        """Exit with status 2, and one line instead of the usage, which is hundreds of lines long."""
        self.exit(2, f"{_program()}: error: {message}\n")

    def add_config(self, argv: Sequence[str] | None) -> None:
        """Take defaults from the JSON file of ``--config``, whose keys must be flags; the command line wins over it."""
        self.add_argument("--config", help="JSON file of arguments; the command line wins over it.")
        path = look_ahead(argv, "config").config
        stored = _read_config(path)
        with user_input():
            if unknown := sorted(set(stored) - {action.dest for action in self._actions}):
                raise ValueError(f"{path} has unknown keys: {', '.join(unknown)}. Flags are listed by --help.")
            for action in self._actions:
                if action.choices is not None and stored.get(action.dest) not in (None, *action.choices):
                    allowed = ", ".join(map(str, action.choices))
                    raise ValueError(f"{path}: `{action.dest}` must be one of {allowed}, got {stored[action.dest]!r}.")
        self.set_defaults(**stored)

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One object of each dataclass; an unknown flag, or a value of a wrong type, ends the process with status 2."""
        _, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else ". --help lists all flags."
            self.error(f"unknown arguments: {' '.join(unknown)}{hint}")
        with user_input():
            parsed = self.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
            groups = tuple(group for group in parsed if not isinstance(group, Namespace))
            check_smoothing(groups)
        return groups


def _read_config(path: str | None) -> dict[str, Any]:
    """A JSON object of arguments; empty without a file."""
    if path is None:
        return {}
    with user_input():
        if not Path(path).is_file():
            raise FileNotFoundError(f"`config` {path} does not exist.")
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold one JSON object of arguments, got a {type(config).__name__}.")
        return config


class Clock:
    """Seconds of each part of a run, in ``seconds`` by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part since the last lap ends here."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 1)
        self._last = now


def say(text: str) -> None:
    """Print a line of its own, once, in however many processes."""
    if PartialState().is_main_process:
        print(f"\n{text}", flush=True)
