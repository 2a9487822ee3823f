"""The Markdown page of a board of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.leaderboard import page as leaderboard
from benchmarks.leaderboard.tables import Cell

from .board import AdapterBoard

INTRODUCTION = """# Language models and adapters
"""


def page(board: AdapterBoard, cells: Sequence[Cell]) -> str:
    """The whole page."""
    return leaderboard.page(cells, INTRODUCTION)
