"""The command line of every example: defaults by the kind of data, all of them in --help, and errors in one line."""

from __future__ import annotations

import contextlib
import difflib
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from examples.running import leave_process_group
from examples.training_flags import check_smoothing

_USERS = "is_about_input"
"""Attribute of an exception that a wrong flag or file has caused: it needs no traceback."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Errors in here are about what the user gave: `run` prints them in one line, callers get them as they are."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        setattr(error, _USERS, True)
        raise


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """``main`` on the command line's arguments; an error about these is a line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError) as error:
        if not getattr(error, _USERS, False):
            raise
        print(f"{_program()}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    leave_process_group()


def _program() -> str:
    """How the example was called."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec is not None else sys.argv[0]


def look_ahead(argv: Sequence[str] | None, *flags: str) -> Namespace:
    """The values of some flags before the others are read: they decide the others' defaults."""
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        first.add_argument(f"--{flag}")
    return first.parse_known_args(argv)[0]


class _DefaultsByKind(ArgumentDefaultsHelpFormatter):
    """Where a default depends on the data, all of its values."""

    def _get_help_string(self, action: Action) -> str | None:
        by_kind = getattr(action, "by_kind", None)
        if by_kind is None:
            return super()._get_help_string(action)
        shown = "; ".join(f"{kind}: {value}" for kind, value in by_kind.items())
        return f"{action.help} (default: {shown})".replace("%(default)s", "").replace("%", "%%")


class _Parser(HfArgumentParser):
    """Errors without the usage, which is hundreds of lines long."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_program()}: error: {message}\n")


def example_parser(groups: Sequence[Any], kinds: Mapping[str, Mapping[str, Any]], chosen: str) -> HfArgumentParser:
    """A parser of dataclasses.

    Args:
        groups: the dataclasses.
        kinds: defaults by kind of data, in place of the dataclasses' own.
        chosen: the kind at hand, whose defaults count.
    """
    parser = _Parser(groups, allow_abbrev=False, formatter_class=_DefaultsByKind)  # type: ignore[arg-type]
    show_defaults(parser, kinds)
    parser.set_defaults(**kinds[chosen])
    return parser


def show_defaults(parser: ArgumentParser, kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Let --help show each kind's default where they differ, before `set_defaults` picks one."""
    for action in parser._actions:
        values = {kind: table.get(action.dest, action.default) for kind, table in kinds.items()}
        if SUPPRESS not in values.values() and len({repr(value) for value in values.values()}) > 1:
            action.by_kind = values  # type: ignore[attr-defined]


def parse(parser: HfArgumentParser, argv: Sequence[str] | None) -> tuple[Any, ...]:
    """One object of each dataclass.

    Raises:
        SystemExit: an unknown flag, or a value of the wrong type.
        ValueError: a value out of range, or one that the example cannot honour.
    """
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else ". --help lists all flags."
        parser.error(f"unknown arguments: {' '.join(unknown)}{hint}")
    with user_input():
        parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
        groups = tuple(group for group in parsed if not isinstance(group, Namespace))
        check_smoothing(groups)
    return groups
