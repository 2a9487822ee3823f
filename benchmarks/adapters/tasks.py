"""The tasks: which model learns them, how its labels are read off, and how long it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.real_data.data import Row, load_reported, load_training

MAX_LENGTH = 128
NUM_ANSWERS = 4
FOLDERS = {"arc_easy": "choice/ARC-Easy", "openbookqa": "choice/OpenBookQA"}
BEGIN, END = "Please choose the correct answer to the question: ", "\n\nAnswer format: answer1/answer2/answer3/answer4"
CLOSING = "\n\nthe correct answer is answer"
"""What the answer's digit follows."""


@dataclass(frozen=True)
class AdapterTask:
    """A task and the training of an adapter for it.

    Attributes:
        model: "encoder" or "decoder", which the adapter is of.
        steps: optimizer steps.
        batch_size: rows per step.
        learning_rate: its peak; it falls to 0 linearly.
        num_labels: C.
        answers: the labels are digits, tokens of the language model; else classes of a new sequence head.
        most_rows: of the held-out and of each reported part, drawn at random by a fixed seed; None: all.
    """

    model: Literal["encoder", "decoder"]
    steps: int
    batch_size: int
    learning_rate: float
    num_labels: int
    answers: bool = False
    most_rows: int | None = None


TASKS = {
    "cola": AdapterTask("encoder", 1200, 32, 1e-3, 2),
    "mrpc": AdapterTask("encoder", 1200, 16, 1e-3, 2),
    "trec": AdapterTask("decoder", 300, 8, 5e-4, 6, most_rows=300),
    "arc_easy": AdapterTask("decoder", 300, 8, 3e-4, NUM_ANSWERS, answers=True, most_rows=300),
    "openbookqa": AdapterTask("decoder", 300, 8, 3e-4, NUM_ANSWERS, answers=True, most_rows=300),
}
"""By name, in the order of the page; set by training losses, before a reported row was looked at.

CoLA and MRPC need more steps than TREC: 400 at CoLA's settings and 125 of 8 pairs of MRPC leave the encoder's adapter
at the majority class.
"""


def load_rows(name: str, data_dir: Path, tokenizer: Any, seed: int) -> tuple[list[Row], list[Row]]:
    """Tokenised rows to fit, and the held-out tenth of the training file; the shuffle depends on the seed alone."""
    if name not in FOLDERS:
        return load_training(name, data_dir, tokenizer, seed)
    rows = _choices(name, data_dir, tokenizer, "train")
    order = np.random.default_rng(seed).permutation(len(rows))
    held = len(rows) // 10
    return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]


def load_reports(name: str, data_dir: Path, tokenizer: Any) -> dict[str, list[Row]]:
    """The parts that are reported, of at most the task's rows."""
    parts = (
        {"test": _choices(name, data_dir, tokenizer, "test")}
        if name in FOLDERS
        else load_reported(name, data_dir, tokenizer)
    )
    return {part: some(rows, TASKS[name].most_rows) for part, rows in parts.items()}


def some(rows: Sequence[Row], most: int | None) -> list[Row]:
    """At most so many rows, the same for every method and seed, in the order of the file."""
    if most is None or len(rows) <= most:
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:most])]


def prompt(instruction: str) -> str:
    """The question and its answers, without the words that all instructions share, up to the digit of the answer.

    >>> prompt(BEGIN + "Is ice warm? Answer1: yes Answer2: no" + END)
    'Is ice warm? Answer1: yes Answer2: no\\n\\nthe correct answer is answer'
    """
    return instruction.strip().removeprefix(BEGIN).removesuffix(END) + CLOSING


def _choices(name: str, data_dir: Path, tokenizer: Any, split: str) -> list[Row]:
    """Rows of at most `MAX_LENGTH` tokens whose answer is one of the first four."""
    questions = _read(Path(data_dir) / FOLDERS[name] / f"{split}.json")
    encoded = tokenizer([text for text, _ in questions])
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, (_, label) in zip(encoded["input_ids"], questions, strict=True)
    ]
    return [row for row in rows if len(row["input_ids"]) <= MAX_LENGTH]


@cache
def _read(path: Path) -> list[tuple[str, int]]:
    labels = {f"answer{i + 1}": i for i in range(NUM_ANSWERS)}
    found = json.loads(path.read_text(encoding="utf-8"))
    return [(prompt(one["instruction"]), labels[one["answer"]]) for one in found if one["answer"] in labels]
