"""The command line of the board of adapters."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import benchmarks.adapters as package
from benchmarks.leaderboard.__main__ import count, seeds, several
from benchmarks.leaderboard.rows import plan, run_rows
from benchmarks.leaderboard.tables import cells

from .board import KIND, AdapterBoard
from .methods import METHODS
from .page import write_page
from .tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 1 if a row failed, for the exit status."""
    args = _parser().parse_args(argv)
    board = AdapterBoard(args.data_dir, args.output_dir, args.encoder, args.decoder)
    rows = plan(args.tasks, args.seeds, [KIND], args.methods, METHODS)
    failed = {} if args.report_only else run_rows(board, rows, args.processes)
    for row, error in failed.items():
        print(f"failed: {row}: {error}", file=sys.stderr)
    found = cells(board, args.tasks, args.seeds, [KIND], args.methods, args.num_resamples)
    (board.output_dir / "adapters.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.page is not None:
        write_page(args.page, board, found, args.num_resamples)
    return min(len(failed), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks, methods = list(TASKS), list(METHODS)
    parser.add_argument("--tasks", type=several(tasks), default=tasks, help=f"of {','.join(tasks)}")
    parser.add_argument("--methods", type=several(methods), default=methods, help=f"of {','.join(methods)}")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="such as 0,1,2")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder that holds glue, trec and choice")
    parser.add_argument("--output_dir", type=Path, required=True, help="holds a folder per plain adapter")
    parser.add_argument("--encoder", help="pretrained encoder, of cola and mrpc")
    parser.add_argument("--decoder", help="pretrained language model, of the other tasks")
    parser.add_argument("--processes", type=count, default=1, help="rows at a time, each on one core; 0: all in this")
    parser.add_argument("--report_only", action="store_true", help="run nothing: tables of what is there")
    parser.add_argument("--num_resamples", type=count, default=1000, help="of the bootstrap")
    parser.add_argument("--page", type=Path, help="Markdown page; its tables are written anew")
    return parser


if __name__ == "__main__":
    sys.exit(main())
