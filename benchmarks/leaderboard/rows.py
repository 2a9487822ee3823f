"""The rows of a board: which there are, which are done, and running the others, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.real_data.context import OVERFIT, Context, folder_name, is_saved, load_record, run
from benchmarks.real_data.finetune import EPOCHS, RECORD, finetune

from .methods import METHODS, Method

OVERFIT_FACTOR = 3
"""How many times as long an over-fitted checkpoint is trained."""
TRAIN = "train"
"""The row that makes a checkpoint."""


@dataclass(frozen=True, order=True)
class Row:
    """A line of work: a method on a checkpoint, or the checkpoint's training."""

    task: str
    seed: int
    kind: str
    method: str

    def __str__(self) -> str:
        return f"{folder_name(self.task, self.seed, self.kind)} {self.method}"


@dataclass(frozen=True)
class Board:
    """Where everything lies."""

    data_dir: Path
    output_dir: Path
    model: str | None = None
    """The pretrained encoder, with which missing checkpoints are trained; None: they are left out."""

    @property
    def methods(self) -> Mapping[str, Method]:
        """By name, in the order of the tables."""
        return METHODS

    def pretrained(self, task: str) -> str | None:
        """What the checkpoints of a task are trained from."""
        return self.model

    def folder(self, row: Row) -> Path:
        return self.output_dir / folder_name(row.task, row.seed, row.kind)

    def is_trained(self, row: Row) -> bool:
        return (self.folder(row) / RECORD).exists()

    def is_done(self, row: Row) -> bool:
        return self.is_trained(row) if row.method == TRAIN else is_saved(self.folder(row), row.method)

    def record(self, row: Row) -> dict[str, Any]:
        return load_record(self.folder(row), row.method)

    def training(self, row: Row) -> dict[str, Any]:
        return dict(json.loads((self.folder(row) / RECORD).read_text(encoding="utf-8")))

    def context(self, row: Row) -> Context:
        return Context(row.task, row.seed, self.data_dir, self.output_dir, self.model, row.kind)

    def run(self, row: Row) -> None:
        """Do a row's work in this process; its files say that it is done."""
        if row.method == TRAIN:
            self.train(row)
        else:
            self.predict(row)

    def predict(self, row: Row) -> None:
        """Fit the method and keep its predictions."""
        run(self.context(row), row.method, self.methods[row.method].run)

    def train(self, row: Row) -> None:
        """Make the checkpoint."""
        epochs = EPOCHS[row.task] * (OVERFIT_FACTOR if row.kind == OVERFIT else 1)
        finetune(str(self.model), row.task, row.seed, self.data_dir, self.folder(row), epochs)


def plan(
    tasks: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str],
    methods: Sequence[str],
    known: Iterable[str] = METHODS,
) -> list[Row]:
    """Every row, in the order of the arguments: seed by seed, so that whole tables are there early.

    ``known``: the board's methods, in their order.
    """
    named = [name for name in known if name in methods]  # one that reads another's predictions comes after it
    return [
        Row(task, seed, kind, name) for seed in seeds for kind in kinds for task in tasks for name in (TRAIN, *named)
    ]


def run_rows(board: Board, rows: Iterable[Row], processes: int = 1) -> dict[Row, str]:
    """Run the rows that are not done, so many at a time; returns those that failed, and why.

    A row starts when those before it on its checkpoint have ended, for it may read what they left. With 0 processes all
    run in this one, whose peak memory is then that of all.
    """
    todo: dict[Path, list[Row]] = {}
    for row in rows:
        if not board.is_done(row) and (board.pretrained(row.task) is not None or board.is_trained(row)):
            todo.setdefault(board.folder(row), []).append(row)
    failed: dict[Row, str] = {}
    for row, outcome in _outcomes(board, todo, processes):
        print(f"{row}: {outcome or 'done'}", flush=True)
        if outcome:
            failed[row] = outcome
            if row.method == TRAIN:
                todo[board.folder(row)].clear()  # there is no checkpoint for them
    return failed


def _outcomes(board: Board, todo: dict[Path, list[Row]], processes: int) -> Iterator[tuple[Row, str]]:
    """The rows that end, and their errors; what is still in ``todo`` when one has ended goes on."""
    if processes == 0:
        for queue in todo.values():
            while queue:
                row = queue.pop(0)
                yield row, attempt(board, row)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, which begin afterwards
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        running: dict[Future[str], Row] = {}
        while running or any(todo.values()):
            busy = {board.folder(row) for row in running.values()}
            for folder, queue in todo.items():
                if queue and folder not in busy and len(running) < processes:
                    row = queue.pop(0)
                    running[pool.submit(_alone, board, row)] = row
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                yield running.pop(future), future.result() if error is None else f"{type(error).__name__}: {error}"


def _alone(board: Board, row: Row) -> str:
    """`attempt` in a process of its own."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return attempt(board, row)


def attempt(board: Board, row: Row) -> str:
    """Run a row; the other rows go on after an error, which is returned: empty if there is none."""
    try:
        board.run(row)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return ""
