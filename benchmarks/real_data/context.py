"""What a method is given: the checkpoint and the rows of one task and seed; and where its predictions are kept."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from .data import BATCH_SIZE, Batch, Row, batches, by_length, labels, load_reported, load_training
from .finetune import RECORD

Arrays = dict[str, np.ndarray]
"""Of one part, in the order of its rows: "probs" (N, C), and whatever else is worth keeping, N first."""

Predictor = Callable[[str], Arrays]
"""The arrays of a part, by its name."""

BEST, OVERFIT = KINDS = ("best", "overfit")


def folder_name(task: str, seed: int, kind: str = BEST) -> str:
    """Of a checkpoint."""
    return f"{task}-{seed}" + ("" if kind == BEST else f"-{kind}")


@dataclass(frozen=True)
class Context:
    """One checkpoint. A method may fit on ``train`` and choose on ``held_out``; the other parts are for reporting."""

    task: str
    seed: int
    data_dir: Path
    output_dir: Path
    pretrained: str | None = None
    """The model that fine-tuning began with, for methods that ask for it."""
    kind: str = BEST
    """Of the checkpoint: "best", of as many epochs as suit the task, or "overfit", of three times as many."""
    fits: dict[Any, Any] = field(default_factory=dict)
    """Posteriors that several methods of one run share."""

    @property
    def folder(self) -> Path:
        return self.output_dir / folder_name(self.task, self.seed, self.kind)

    @property
    def training(self) -> dict[str, Any]:
        """The record of the checkpoint's training."""
        return dict(json.loads((self.folder / RECORD).read_text(encoding="utf-8")))

    @property
    def members(self) -> list[Context]:
        """The checkpoints of this task and kind that are complete, this one first: one for each seed."""
        seeds = [int(path.parent.name.split("-")[1]) for path in self.output_dir.glob(f"{self.task}-*/{RECORD}")]
        others = [replace(self, seed=seed, fits={}) for seed in sorted({*seeds} - {self.seed})]
        return [self, *(other for other in others if (other.folder / RECORD).exists())]

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def _training(self) -> tuple[list[Row], list[Row]]:
        return load_training(self.task, self.data_dir, self.tokenizer, self.seed)

    @property
    def train(self) -> list[Row]:
        """What the checkpoint was trained on."""
        return self._training[0]

    @property
    def held_out(self) -> list[Row]:
        """The tenth of the training file that it never saw."""
        return self._training[1]

    @cached_property
    def parts(self) -> dict[str, list[Row]]:
        """All parts that are predicted, by name."""
        return {"held_out": self.held_out} | load_reported(self.task, self.data_dir, self.tokenizer)

    def model(self) -> PreTrainedModel:
        """The checkpoint, loaded afresh: a method may change it."""
        return AutoModelForSequenceClassification.from_pretrained(self.folder).eval()

    def batches(self, rows: Sequence[Row], size: int = BATCH_SIZE) -> list[Batch]:
        """Batches of rows of similar length, with labels inside; in another order than the rows."""
        return list(batches([rows[i] for i in by_length(rows)], self.tokenizer, size))

    def predict(self, part: str, function: Callable[[Batch], dict[str, Tensor]], size: int = BATCH_SIZE) -> Arrays:
        """The arrays that ``function`` makes of each batch, joined in the order of the part's rows."""
        rows = self.parts[part]
        found = [function(batch) for batch in self.batches(rows, size)]
        order = np.argsort(by_length(rows))
        return {name: torch.cat([one[name] for one in found]).double().numpy()[order] for name in found[0]}

    def saved(self, method: str, part: str) -> Arrays:
        """What another method predicted.

        Raises:
            FileNotFoundError: it has not been run.
        """
        return load_arrays(self.folder, method)[part]


def run(
    context: Context,
    name: str,
    method: Callable[[Context], tuple[Predictor, dict[str, Any]]],
    *,
    reported_only: bool = False,
) -> dict[str, Any]:
    """Fit a method, predict every part, keep arrays and record in the checkpoint's folder; returns the record.

    With ``reported_only`` the held-out rows are not predicted, which only tables of held-out rows read.

    Its seconds are the processor's, of all threads: a busy machine does not change them.
    """
    rows = len(context.train)  # read before the clock starts
    start = time.process_time()
    predictor, chosen = method(context)
    fitted = time.process_time()
    parts = {k: v for k, v in context.parts.items() if k != "held_out" or not reported_only}
    found = {part: predictor(part) for part in parts}
    done = time.process_time()
    arrays = {f"{part}/{key}": value for part, named in found.items() for key, value in named.items()}
    arrays |= {f"{part}/labels": labels(rows) for part, rows in parts.items()}
    record = {
        "method": name,
        "task": context.task,
        "seed": context.seed,
        "kind": context.kind,
        "chosen": chosen,
        "fit_seconds": fitted - start,
        "predict_seconds": done - fitted,
        "train_rows": rows,
        "predicted_rows": sum(len(rows) for rows in parts.values()),
        "threads": torch.get_num_threads(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # of the process: also earlier methods'
    }
    path = _path(context.folder, name)
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    unfinished = path.with_suffix(".json.part")  # a record is whole or not there, and is written last
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path.with_suffix(".json"))
    return record


def load_arrays(folder: Path, method: str) -> dict[str, Arrays]:
    """The arrays of every part that a method's run left, labels among them."""
    parts: dict[str, Arrays] = {}
    with np.load(_path(folder, method)) as file:
        for key in file.files:
            part, name = key.split("/")
            parts.setdefault(part, {})[name] = file[key]
    return parts


def load_record(folder: Path, method: str) -> dict[str, Any]:
    """What a method chose and how long it took."""
    return dict(json.loads(_path(folder, method).with_suffix(".json").read_text(encoding="utf-8")))


def is_saved(folder: Path, method: str) -> bool:
    return _path(folder, method).with_suffix(".json").exists()


def _path(folder: Path, method: str) -> Path:
    return folder / "predictions" / f"{method}.npz"
