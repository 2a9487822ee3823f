"""The rows of a task: what is trained on, what is held out, what is only reported; and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import DataCollatorWithPadding

from bayeformers.tasks.glue import GLUE_TASKS, read_split

FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "sst2": "SST-2"}
LIMIT = {"sst2": 20_000}
BATCH_SIZE = 32
MAX_LENGTH = 128

Row = dict[str, Any]
Batch = dict[str, Tensor]


def load_training(task_name: str, data_dir: str | Path, tokenizer: Any, seed: int) -> tuple[list[Row], list[Row]]:
    """Nine tenths to fit, one tenth held out; the shuffle depends on the seed alone."""
    rows = _load(task_name, data_dir, tokenizer, "train")[: LIMIT.get(task_name)]
    order = np.random.default_rng(seed).permutation(len(rows))
    held = len(rows) // 10
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def load_reported(task_name: str, data_dir: str | Path, tokenizer: Any) -> dict[str, list[Row]]:
    """The parts that are reported: "dev", or "in_domain" and "out_of_domain" where the task has both."""
    if GLUE_TASKS[task_name].tsv.shifted is None:
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
    task = GLUE_TASKS[task_name]
    split = read_split(task, Path(data_dir) / FOLDERS[task_name], split_name)
    encoded = tokenizer(*(list(split[column]) for column in task.columns), truncation=True, max_length=MAX_LENGTH)
    columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    columns["labels"] = split["label"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
