"""The Markdown page of a board of adapters: prose written by hand, and below a mark the tables, written anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.leaderboard import page as leaderboard
from benchmarks.leaderboard.rows import Row
from benchmarks.leaderboard.tables import Cell

from . import errors
from .board import KIND, AdapterBoard
from .tasks import TASKS

MARK = "<!-- python -m benchmarks.adapters --page writes what follows -->"


def write_page(path: Path, board: AdapterBoard, cells: Sequence[Cell], num_resamples: int = 1000) -> None:
    """Write the tables below the mark; what a page that exists has above it stays."""
    above = path.read_text(encoding="utf-8").split(MARK)[0] if path.exists() else "# Language models\n\n"
    tables = leaderboard.page(cells, f"{MARK}\n\n{trainings(board, cells)}")
    text = "\n".join([above + tables, *(_errors(board, cell, num_resamples) for cell in cells)])
    path.write_text(text, encoding="utf-8")


def trainings(board: AdapterBoard, cells: Sequence[Cell]) -> str:
    """What each plain adapter was trained with, and to which loss."""
    header = ["adapter", "model", "steps", "batch", "rate", "epochs", "last loss", "CPU seconds"]
    lines = []
    for cell in cells:
        task = TASKS[cell["task"]]
        for seed in cell["methods"]["map"]["seeds"]:
            record = board.training(Row(cell["task"], seed, KIND, "map"))
            lines.append([
                f"{cell['task']}, seed {seed}",
                task.model,
                str(record["steps"]),
                str(task.batch_size),
                f"{task.learning_rate:g}",
                f"{record['epoch']:.2f}",
                f"{_last_loss(record):.3f}",
                f"{record['cpu_seconds']:.0f}",
            ])
    return f"## Trainings\n\n{leaderboard.grid(header, lines)}"


def _errors(board: AdapterBoard, cell: Cell, num_resamples: int) -> str:
    seeds = sorted({seed for method in cell["methods"].values() for seed in method["seeds"]})
    rows = errors.of_seeds(board, cell["task"], seeds, KIND, list(cell["methods"]))
    return f"## {cell['task']}: which answers are wrong\n\n{errors.table(board, rows, num_resamples)}\n"


def _last_loss(record: dict[str, Any]) -> float:
    """The mean over the last steps that were logged together."""
    losses = [float(entry["loss"]) for entry in record["log"] if "loss" in entry]
    return losses[-1] if losses else float("nan")
