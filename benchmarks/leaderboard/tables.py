"""What the records and predictions of a board say: values, paired differences and costs of every method on every cell.

A cell is a task and a kind of checkpoint. Values are averaged over its seeds; an interval is over the reported rows,
resampled jointly in all seeds and methods, as they share these rows; the spread between seeds is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.real_data.context import load_arrays

from .methods import REFERENCES
from .rows import Board, Row
from .scores import METRICS, Judged, interval, resamples

Cell = dict[str, Any]
"""{"task", "kind", "rows", "methods": {name: {"seeds", "values", "minus", "cost", "chosen"}}}."""


def cells(
    board: Board,
    tasks: Sequence[str],
    seeds: Sequence[int],
    kinds: Sequence[str],
    methods: Sequence[str],
    num_resamples: int = 1000,
) -> list[Cell]:
    """The cells that have predictions of the fine-tuned model itself; a method is averaged over the seeds it has."""
    found = []
    for kind in kinds:
        for task in tasks:
            rows = {
                name: [row for seed in seeds if board.is_done(row := Row(task, seed, kind, name))] for name in methods
            }
            present = {name: of for name, of in rows.items() if of}
            if "map" in present:
                found.append(_cell(board, task, kind, present, num_resamples))
    return found


def _cell(board: Board, task: str, kind: str, rows: Mapping[str, list[Row]], num_resamples: int) -> Cell:
    labels: np.ndarray | None = None
    values: dict[str, dict[int, np.ndarray]] = {}
    for name, of in rows.items():
        for row in of:
            probs, truth = reported(board, row)
            if labels is None:
                labels, counts = truth, resamples(len(truth), num_resamples)
            elif not np.array_equal(labels, truth):
                raise ValueError(
                    f"{row}: its predictions are of other rows than those before it; remove and rerun them."
                )
            values.setdefault(name, {})[row.seed] = Judged.of(probs, truth).values(counts)
    methods = {name: _method(board, rows[name], values, name) for name in rows}
    return {"task": task, "kind": kind, "rows": 0 if labels is None else len(labels), "methods": methods}


def reported(board: Board, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) and labels (N,) of all parts but the held-out rows, one behind the other."""
    parts = load_arrays(board.folder(row), row.method)
    kept = [arrays for part, arrays in parts.items() if part != "held_out"]
    return np.concatenate([of["probs"] for of in kept]), np.concatenate([of["labels"] for of in kept])


def _method(board: Board, rows: list[Row], values: Mapping[str, Mapping[int, np.ndarray]], name: str) -> dict[str, Any]:
    own = values[name]
    minus = {}
    for reference in REFERENCES:
        both = [seed for seed in own if seed in values.get(reference, {})]
        if reference != name and both:
            change = np.mean([own[seed] - values[reference][seed] for seed in both], axis=0)
            base = np.mean([values[reference][seed][:, 0] for seed in both], axis=0)
            minus[reference] = _by_metric(change, base)
    return {
        "title": board.methods[name].title if name in board.methods else name,
        "seeds": list(own),
        "values": _by_metric(np.mean(list(own.values()), axis=0)),
        "by_seed": {seed: dict(zip(METRICS, draws[:, 0].tolist(), strict=True)) for seed, draws in own.items()},
        "minus": minus,
        "cost": _mean_cost(board, rows),
        "chosen": [board.record(row)["chosen"] for row in rows],
    }


def _by_metric(draws: np.ndarray, base: np.ndarray | None = None) -> dict[str, dict[str, float]]:
    """Of each metric; with the reference's values also the change relative to them."""
    found = {metric: interval(own) for metric, own in zip(METRICS, draws, strict=True)}
    if base is not None:
        for one, reference in zip(found.values(), base, strict=True):
            one["relative"] = one["value"] / reference if reference else float("nan")
    return found


def cost(board: Board, row: Row) -> dict[str, float]:
    """Seconds of training and fitting, and of predicting, as ratios to the fine-tuned model's; peak memory in MiB.

    What other rows did for this one counts: the predictions it reads, the fit it shares, its members' trainings.
    Predictions are compared by the row, for some methods predict the held-out rows as well.
    """
    base, training = board.record(replace(row, method="map")), board.training(row)["cpu_seconds"]
    records = _used(board, row).values()
    fit = sum(one["fit_seconds"] + one["chosen"].get("shared_seconds", 0.0) for one in records)
    predict = sum(_seconds_per_row(one) for one in records)
    seeds = {seed for one in records for seed in one["chosen"].get("members", ())} - {row.seed}
    trainings = training + sum(board.training(replace(row, seed=seed))["cpu_seconds"] for seed in seeds)
    return {
        "train": (trainings + fit) / training,
        "fit": fit / training,
        "predict": predict / _seconds_per_row(base),
        "peak_mib": max(one.get("peak_mib", 0.0) for one in records),
    }


def _seconds_per_row(record: Mapping[str, Any]) -> float:
    return float(record["predict_seconds"] / record["predicted_rows"])


def _used(board: Board, row: Row) -> dict[Row, dict[str, Any]]:
    """The record of the row, and those of the rows whose predictions it reads, of each of its members, and they."""
    found, ahead = dict[Row, dict[str, Any]](), [row]
    while ahead:
        if (one := ahead.pop()) not in found:
            found[one] = board.record(one)
            chosen = found[one]["chosen"]
            seeds = chosen.get("members", [one.seed])
            ahead += [replace(one, seed=seed, method=name) for name in chosen.get("reads", ()) for seed in seeds]
    return found


def _mean_cost(board: Board, rows: Sequence[Row]) -> dict[str, float]:
    costs = [cost(board, row) for row in rows if board.is_done(replace(row, method="map"))]
    return {key: float(np.mean([one[key] for one in costs])) for key in costs[0]} if costs else {}
