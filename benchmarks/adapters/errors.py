"""Which answers are wrong: AUROC of finding a method's errors by scores of its own, beside what sampling would tell.

The rival at equal S is disagreement: S answers sampled from the plain model's probabilities, of which the share that is
not the most frequent one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.leaderboard.page import DASH, grid
from benchmarks.leaderboard.rows import Board, Row
from benchmarks.leaderboard.scores import METRICS, Judged, interval, resamples
from benchmarks.real_data.context import Arrays, load_arrays

NUM_ANSWERS = 10
"""Sampled from the plain model: as many as a posterior's draws."""
SCORES = ("confidence", "entropy", "mutual information", "disagreement of sampled answers")
TINY = 1e-30


def scores(arrays: Arrays, seed: int = 0) -> dict[str, np.ndarray]:
    """Uncertainty of each row by each score that the arrays allow, larger for less certain, (N,)."""
    probs = arrays["probs"]
    found = {"confidence": 1 - probs.max(-1), "entropy": entropy(probs)}
    if "draws" in arrays:
        found["mutual information"] = entropy(arrays["draws"].mean(1)) - entropy(arrays["draws"]).mean(1)
    found["disagreement of sampled answers"] = disagreement(probs, NUM_ANSWERS, seed)
    return found


def entropy(probs: np.ndarray) -> np.ndarray:
    """Over the last axis, in nats."""
    return np.asarray(-(probs * np.log(probs.clip(TINY))).sum(-1))


def disagreement(probs: np.ndarray, num_answers: int, seed: int) -> np.ndarray:
    """Share of S answers, sampled from ``probs`` (N, C), that are not the most frequent one, (N,)."""
    uniform = np.random.default_rng(seed).random((len(probs), num_answers))
    answers = (uniform[..., None] > np.cumsum(probs, -1)[:, None, :-1]).sum(-1)
    counts = np.stack([(answers == label).sum(1) for label in range(probs.shape[1])], axis=1)
    return np.asarray(1 - counts.max(1) / num_answers)


def table(board: Board, rows: Mapping[str, Sequence[Row]], num_resamples: int) -> str:
    """AUROC of each method's errors by each score, a mean over seeds; ``rows`` by method."""
    header = ["which answers are wrong, AUROC", *SCORES]
    lines = []
    for name, of in rows.items():
        found: dict[str, list[np.ndarray]] = {}
        for row in of:
            for score, draws in _aurocs(board, row, num_resamples).items():
                found.setdefault(score, []).append(draws)
        means = {score: interval(np.mean(draws, axis=0)) for score, draws in found.items()}
        lines.append([board.methods[name].title, *(_shown(means.get(score)) for score in SCORES)])
    return grid(header, lines)


def _aurocs(board: Board, row: Row, num_resamples: int) -> dict[str, np.ndarray]:
    arrays = reported(board, row)
    labels, none = arrays["labels"], np.zeros(len(arrays["labels"]))
    is_right = (arrays["probs"].argmax(1) == labels).astype(float)
    counts, index = resamples(len(labels), num_resamples), METRICS.index("error_auroc")
    found = scores(arrays, row.seed)
    if row.method != "map":
        found.pop("disagreement of sampled answers")
    return {name: Judged(-own, is_right, none, none).values(counts)[index] for name, own in found.items()}


def reported(board: Board, row: Row) -> Arrays:
    """All arrays of the reported parts, one behind the other."""
    parts = [arrays for part, arrays in load_arrays(board.folder(row), row.method).items() if part != "held_out"]
    return {key: np.concatenate([of[key] for of in parts]) for key in parts[0]}


def of_seeds(board: Board, task: str, seeds: Sequence[int], kind: str, methods: Sequence[str]) -> dict[str, list[Row]]:
    """The rows that are done, by method."""
    first = Row(task, 0, kind, "")
    found = {name: [replace(first, seed=seed, method=name) for seed in seeds] for name in methods}
    done = {name: [row for row in rows if board.is_done(row)] for name, rows in found.items()}
    return {name: rows for name, rows in done.items() if rows}


def _shown(one: Mapping[str, float] | None) -> str:
    return DASH if one is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
