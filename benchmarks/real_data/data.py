"""The rows of a task: what is trained on, what is held out, what is only reported; and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DataCollatorWithPadding

from bayeformers.tasks import TEXT_TASKS, TextTask, read_split

FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2"}
"""Of GLUE's tasks."""
PLACES = {**{task: f"glue/{folder}" for task, folder in FOLDERS.items()}, "trec": "trec", "clinc": "clinc"}
"""Of all tasks, in a folder that holds GLUE's as `glue` beside those of the others."""
LIMIT = {"sst2": 20_000}
BATCH_SIZE = 32
MAX_LENGTH = 128

Row = dict[str, Any]
Batch = dict[str, Tensor]


def load_training(task_name: str, data_dir: str | Path, tokenizer: Any, seed: int) -> tuple[list[Row], list[Row]]:
    """Nine tenths to fit, one tenth held out; the shuffle depends on the seed alone.

    Of a task that has validation and test files, all training rows to fit and the validation rows held out.
    """
    if _has_test(task_name, data_dir):
        train, held_out = (_load(task_name, data_dir, tokenizer, split) for split in ("train", "validation"))
        return train, held_out
    rows = _load(task_name, data_dir, tokenizer, "train")[: LIMIT.get(task_name)]
    order = np.random.default_rng(seed).permutation(len(rows))
    held = len(rows) // 10
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def load_reported(task_name: str, data_dir: str | Path, tokenizer: Any) -> dict[str, list[Row]]:
    """The parts that are reported: "dev", or "in_domain" and "out_of_domain" where the task has both."""
    if _has_test(task_name, data_dir):
        return {"test": _load(task_name, data_dir, tokenizer, "test")}
    if TEXT_TASKS[task_name].tsv.shifted is None:
        return {"dev": _load(task_name, data_dir, tokenizer, "validation")}
    splits = {"in_domain": "validation", "out_of_domain": "shifted"}
    return {part: _load(task_name, data_dir, tokenizer, split) for part, split in splits.items()}


def labels(rows: Sequence[Row]) -> np.ndarray:
    """Shape: (N,)."""
    return np.array([row["labels"] for row in rows])


def by_length(rows: Sequence[Row]) -> np.ndarray:
    """The order of rows from short to long, in which batches have little padding."""
    return np.argsort([len(row["input_ids"]) for row in rows], kind="stable")


def batches(rows: Sequence[Row], tokenizer: Any, size: int = BATCH_SIZE) -> Iterator[Batch]:
    """Padded batches in the order of the rows, with labels inside."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(rows), size):
        yield dict(collate(list(rows[start : start + size])))


def _load(task_name: str, data_dir: str | Path, tokenizer: Any, split_name: str) -> list[Row]:
    """Tokenised rows with labels."""
    task, split = TEXT_TASKS[task_name], _splits(task_name, str(data_dir), split_name)
    encoded = tokenizer(*(list(split[column]) for column in task.columns), truncation=True, max_length=MAX_LENGTH)
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    columns["labels"] = split["label"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _splits(task_name: str, data_dir: str, split_name: str) -> dict[str, list[Any]]:
    task, folder = TEXT_TASKS[task_name], _folder(task_name, data_dir)
    return task.read(folder)[split_name] if isinstance(task, TextTask) else read_split(task, folder, split_name)


@cache
def _has_test(task_name: str, data_dir: str | Path) -> bool:
    task = TEXT_TASKS[task_name]
    return isinstance(task, TextTask) and "test" in task.read(_folder(task_name, data_dir))


def _folder(task_name: str, data_dir: str | Path) -> Path:
    """Where the task's files are, in the folder of GLUE's or in one that holds GLUE's as `glue`."""
    beside = Path(data_dir) / FOLDERS.get(task_name, PLACES[task_name])
    return beside if beside.is_dir() else Path(data_dir) / PLACES[task_name]
