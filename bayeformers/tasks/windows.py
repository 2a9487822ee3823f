"""Questions as windows of tokens that a model can read, and back: where each token stands in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .squad import Question

POSITIONS = ("start_positions", "end_positions")


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
        """Tokens of the text in the window."""
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
        return [self._span(*answer) for answer in self.question.answers]

    def _span(self, start: int, text: str) -> tuple[int, int]:
        return token_span(self.offsets, start, start + len(text))

    def text(self, first: int, last: int) -> str:
        """The characters from token ``first`` to token ``last``."""
        return self.question.context[self.offsets[first][0] : self.offsets[last][1]]

    def labels(self, window: Window) -> tuple[int, int]:
        """Positions of the first annotator's answer in a window; the class token's where it does not hold all of it."""
        for answer in self.question.answers[:1]:
            first, last = (token - window.first for token in self._span(*answer))
            if first >= 0 and last < window.size:
                return window.context.start + first, window.context.start + last
        return window.null, window.null


def token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return the first and the last token that overlap the characters ``start`` .. ``end`` - 1.

    >>> token_span([(0, 3), (4, 7), (7, 9)], 4, 9)
    (1, 2)

    Args:
        offsets: characters (begin, end) of each token, the end not included.
        start: the first character.
        end: the character behind the last one.

    Raises:
        ValueError: No token does.
    """
    inside = [index for index, (begin, stop) in enumerate(offsets) if begin < end and stop > start]
    if not inside:
        raise ValueError(f"no token of the text overlaps characters {start} .. {end - 1}: is the answer only spaces?")
    return inside[0], inside[-1]


def read_windows(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, max_length: int, stride: int
) -> tuple[list[Reading], dict[str, list[Any]]]:
    """Return a reading for each question, and the model's inputs; a long text is tokenised in several windows.

    The inputs are columns with a row for each window, with the labels ``start_positions`` and ``end_positions``.

    Args:
        questions: what is asked.
        tokenizer: a fast one, which knows the offsets of its tokens.
        max_length: tokens of a window, of question and text together.
        stride: tokens of the text that neighbouring windows share. An answer of at most so many lies whole in one.

    Raises:
        ValueError: A slow tokenizer, or a question that leaves a window too little text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"`model_name_or_path` needs a fast tokenizer, got {type(tokenizer).__name__}.")
    tokenizer.padding_side = "right"  # so that positions count from the front
    names = tokenizer.model_input_names
    readings: list[Reading] = []
    columns: dict[str, list[Any]] = {name: [] for name in (*names, *POSITIONS)}
    for question in questions:
        encoded = _encode(question, tokenizer, max_length, stride)
        reading = _reading(question, encoded, tokenizer.cls_token_id, stride)
        readings.append(reading)
        labels = zip(*map(reading.labels, reading.windows), strict=True)
        of_windows = {**{name: encoded[name] for name in names}, **dict(zip(POSITIONS, labels, strict=True))}
        for name, column in columns.items():
            column += of_windows[name]
    return readings, columns


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
