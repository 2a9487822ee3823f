"""Laplace fits that several rows share: the first row pays and keeps the curvature, and all record what it cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bayeformers import laplace
from bayeformers.laplace import LaplacePosterior
from benchmarks.real_data.context import Context
from benchmarks.real_data.data import BATCH_SIZE, Batch
from benchmarks.real_data.methods import CALIBRATION_ROWS

NUM_BATCHES = 100
"""Random batches of the training rows that the curvature is summed over, and scaled up from."""


def fitted(
    context: Context, *, prior_precision: str | float, num_batches: int | None = NUM_BATCHES, **options: Any
) -> tuple[LaplacePosterior, dict[str, Any]]:
    """Return the posterior at the tau of a rule; and "shared_seconds", what the kept curvature cost another row."""
    model = context.model()
    folder = context.folder / "fits" / "-".join(["laplace", *map(str, options.values()), str(num_batches)])
    cost, path = {}, folder / "cost.json"
    if path.exists():
        cost = json.loads(path.read_text(encoding="utf-8"))
        posterior = LaplacePosterior.load(folder, model)
    else:
        posterior = _fit(context, model, folder, num_batches, options)
    if prior_precision == "holdout":
        rows: dict[str, Any] = {"validation": context.batches(context.held_out[: CALIBRATION_ROWS["glm"]])}
    else:
        rows = {"training": random_batches(context, num_batches)} if prior_precision == "leverage" else {}
    return laplace.tune(posterior, prior_precision, progress=False, **rows), cost


def random_batches(context: Context, num_batches: int | None) -> list[Batch]:
    """So many batches of training rows, drawn by the checkpoint's seed; all rows if None."""
    size = None if num_batches is None else num_batches * BATCH_SIZE
    order = np.random.default_rng(context.seed).permutation(len(context.train))[:size]
    return context.batches([context.train[i] for i in order])


def _fit(
    context: Context, model: Any, folder: Path, num_batches: int | None, options: dict[str, Any]
) -> LaplacePosterior:
    start = time.process_time()
    batches = random_batches(context, num_batches)
    posterior = laplace.fit(model, batches, num_data=len(context.train), prior_precision=1.0, progress=False, **options)
    seconds = time.process_time() - start
    folder.mkdir(parents=True, exist_ok=True)
    posterior.save(folder)
    (folder / "cost.json").write_text(json.dumps({"shared_seconds": seconds}) + "\n", encoding="utf-8")
    return posterior
