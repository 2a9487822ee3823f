"""Questions -> windows of tokens that a model can read, and back: where a token stands in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from examples.squad.data import Question


@dataclass(frozen=True)
class Window:
    """One row of the model's input: ``context`` are the positions in it of the text's tokens ``first`` onwards.

    ``null`` is the position of the class token, at which "no answer here" starts and ends.
    """

    context: slice
    first: int
    null: int

    @property
    def size(self) -> int:
        return int(self.context.stop - self.context.start)


@dataclass(frozen=True)
class Reading:
    """A question as tokens: its windows, and the characters (begin, end) of each token of its whole text."""

    question: Question
    windows: tuple[Window, ...]
    offsets: tuple[tuple[int, int], ...]

    @property
    def gold(self) -> list[tuple[int, int]]:
        """First and last token of each annotator's answer."""
        return [token_span(self.offsets, start, start + len(text)) for start, text in self.question.answers]

    def text(self, first: int, last: int) -> str:
        """What tokens ``first`` .. ``last`` say."""
        return self.question.context[self.offsets[first][0] : self.offsets[last][1]]


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The tokens that hold the characters ``start`` .. ``end`` - 1: the first and the last that overlap them.

    >>> token_span([(0, 3), (4, 7), (7, 9)], 4, 9)
    (1, 2)
    """
    inside = [index for index, (begin, stop) in enumerate(offsets) if begin < end and stop > start]
    if not inside:
        raise ValueError(f"no token of the text overlaps characters {start} .. {end - 1}: is the answer only spaces?")
    return inside[0], inside[-1]


@dataclass
class Readings:
    """A set of questions: ``features`` holds the model's inputs, a row per window, in the order of ``rows``."""

    rows: list[Reading]
    features: Dataset = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)


def read(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, stride: int
) -> Readings:
    """Windows of at most ``max_length`` tokens, neighbours sharing ``stride`` tokens of the text.

    The labels of a window are its first annotator's answer, or the class token where it does not hold all of it.

    Raises:
        ValueError: a slow tokenizer, which knows no offsets, or a question that leaves a window too little text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"`model_name_or_path` needs a fast tokenizer, got {type(tokenizer).__name__}.")
    tokenizer.padding_side = "right"  # so that positions count from the front
    readings, columns = [], {name: [] for name in (*tokenizer.model_input_names, "start_positions", "end_positions")}
    for question in questions:
        encoded = _encode(question, tokenizer, max_length, stride)
        reading = _reading(question, encoded, tokenizer.cls_token_id, stride)
        readings.append(reading)
        labels = [_labels(reading, window) for window in reading.windows]
        for name in tokenizer.model_input_names:
            columns[name] += encoded[name]
        columns["start_positions"] += [start for start, _ in labels]
        columns["end_positions"] += [end for _, end in labels]
    return Readings(readings, Dataset.from_dict(columns))


def _encode(question: Question, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> Any:
    length = len(tokenizer(question.text, verbose=False)["input_ids"]) + tokenizer.num_special_tokens_to_add(pair=True)
    if length + stride >= max_length:
        raise ValueError(
            f"`max_seq_length` {max_length} leaves too little room beside `doc_stride` {stride} for question "
            f"{question.id}, which takes {length} tokens: make it longer, or the stride shorter."
        )
    return tokenizer(
        question.text, question.context, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip


def _reading(question: Question, encoded: Any, class_token: int | None, stride: int) -> Reading:
    """Neighbouring windows share ``stride`` tokens: so a window begins that far before the end of the one before."""
    windows: list[Window] = []
    offsets: list[tuple[int, int]] = []
    for index, ids in enumerate(encoded["input_ids"]):
        positions = [at for at, part in enumerate(encoded.sequence_ids(index)) if part == 1]
        context = slice(positions[0], positions[-1] + 1)
        first = len(offsets) - stride if windows else 0
        windows.append(Window(context, first, ids.index(class_token) if class_token in ids else 0))
        offsets[first:] = [tuple(pair) for pair in encoded["offset_mapping"][index][context]]
    return Reading(question, tuple(windows), tuple(offsets))


def _labels(reading: Reading, window: Window) -> tuple[int, int]:
    if reading.question.answers:
        start, text = reading.question.answers[0]
        first, last = (token - window.first for token in token_span(reading.offsets, start, start + len(text)))
        if first >= 0 and last < window.size:
            return window.context.start + first, window.context.start + last
    return window.null, window.null
