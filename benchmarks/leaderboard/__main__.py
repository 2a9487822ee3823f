"""The command line of the board: run the rows that are missing, then write the page and the table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import benchmarks.leaderboard as package
from benchmarks.real_data.context import KINDS
from benchmarks.real_data.data import PLACES

from .html import table
from .methods import METHODS
from .page import page
from .rows import Board, plan, run_rows
from .tables import cells


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns how many rows failed, for the exit status."""
    args = _parser().parse_args(argv)
    board = Board(args.data_dir, args.output_dir, args.model)
    rows = plan(args.tasks, args.seeds, args.kinds, args.methods)
    failed = {} if args.report_only else run_rows(board, rows, args.processes)
    for row, error in failed.items():
        print(f"failed: {row}: {error}", file=sys.stderr)
    report(board, args)
    return min(len(failed), 1)


def report(board: Board, args: argparse.Namespace) -> None:
    """Write what the arguments ask for, and the numbers of all tables to `leaderboard.json` beside the checkpoints."""
    found = cells(board, args.tasks, args.seeds, args.kinds, args.methods, args.num_resamples)
    text = json.dumps(found, indent=1)
    (board.output_dir / "leaderboard.json").write_text(text + "\n", encoding="utf-8")
    for path, content in ((args.page, page), (args.html, table)):
        if path is not None:
            path.write_text(content(found), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=several(list(PLACES)), default=list(PLACES), help=f"of {','.join(PLACES)}")
    methods = list(METHODS)
    parser.add_argument("--methods", type=several(methods), default=methods, help=f"of {','.join(methods)}")
    parser.add_argument("--kinds", type=several(list(KINDS)), default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds glue, trec and clinc")
    parser.add_argument("--output_dir", type=Path, required=True, help="holds a folder per checkpoint")
    parser.add_argument("--model", help="pretrained encoder; missing checkpoints are trained from it")
    parser.add_argument(
        "--processes", type=count, default=1, help="rows at a time, each on one core; 0: all in this process"
    )
    parser.add_argument("--report_only", action="store_true", help="run nothing: tables of what is there")
    parser.add_argument("--num_resamples", type=count, default=1000, help="of the bootstrap")
    parser.add_argument("--page", type=Path, help="Markdown page of results to write")
    parser.add_argument("--html", type=Path, help="self-contained sortable table to write")
    return parser


def several(allowed: list[str]) -> Callable[[str], list[str]]:
    """A parser of names between commas; the error lists what is allowed."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))} not among {', '.join(allowed)}")
        return list(dict.fromkeys(names))

    return parse


def seeds(text: str) -> list[int]:
    """A parser of whole numbers between commas."""
    names = text.split(",")
    if wrong := [name for name in names if not name.isdigit()]:
        raise argparse.ArgumentTypeError(f"seeds are whole numbers between commas, got {', '.join(map(repr, wrong))}")
    return [int(name) for name in dict.fromkeys(names)]


def count(text: str) -> int:
    """A parser of a whole number >= 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
