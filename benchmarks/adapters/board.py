"""The board of adapters: the leaderboard's, with other contexts, methods and trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.leaderboard.methods import Method
from benchmarks.leaderboard.rows import Board, Row
from benchmarks.real_data.context import run

from .context import AdapterContext
from .methods import METHODS, READ
from .tasks import TASKS
from .training import train_plain

KIND = "lora"


@dataclass(frozen=True)
class AdapterBoard(Board):
    """``model`` is the encoder's folder, ``decoder`` the language model's."""

    decoder: str | None = None

    @property
    def methods(self) -> Mapping[str, Method]:
        return METHODS

    def pretrained(self, task: str) -> str | None:
        return self.model if TASKS[task].model == "encoder" else self.decoder

    def context(self, row: Row) -> AdapterContext:
        return AdapterContext(row.task, row.seed, self.data_dir, self.output_dir, self.pretrained(row.task), row.kind)

    def train(self, row: Row) -> None:
        train_plain(self.context(row))

    def predict(self, row: Row) -> None:
        """Held-out rows are predicted by those methods alone that another reads."""
        method = self.methods[row.method].run
        run(self.context(row), row.method, method, reported_only=row.method not in READ)
