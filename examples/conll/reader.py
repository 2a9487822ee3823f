"""Files in the format of the CoNLL shared tasks: a word per line, its label in the last column, sentences apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.conll.entities import Scheme, detect_scheme, is_label, to_iob2

DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """Words and their IOB2 labels; what group it belongs to, and which words have a label that is drawn at random."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    group: str = "in-domain"
    ambiguous: tuple[int, ...] = ()


def read_conll(path: str) -> tuple[list[Sentence], Scheme]:
    """The sentences of a file, in IOB2, and the scheme that it was written in.

    Columns are separated by blanks or tabs; the first is the word and the last its label. Empty lines and lines that
    begin with ``-DOCSTART-`` end a sentence. Other columns are ignored.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a line with one column, labels of no known scheme, or no sentence; the message names the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    sentences = list(_sentences(path))
    if not sentences:
        raise ValueError(f"{path} has no sentence.")
    try:
        scheme = detect_scheme([labels for _, labels in sentences])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [Sentence(tuple(words), tuple(to_iob2(labels))) for words, labels in sentences], scheme


def _sentences(path: str) -> Iterator[tuple[list[str], list[str]]]:
    words: list[str] = []
    labels: list[str] = []
    with Path(path).open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            columns = [column for column in re.split("[ \t]+", line.rstrip("\n")) if column]
            if columns and not columns[0].startswith(DOCUMENT):
                words.append(columns[0])
                labels.append(_label(path, number, columns))
            elif words:
                yield words, labels
                words, labels = [], []
    if words:
        yield words, labels


def _label(path: str, number: int, columns: list[str]) -> str:
    if len(columns) < 2:
        raise ValueError(f"{path}, line {number}: a word and its label are needed, got {columns[0]!r} alone.")
    if not is_label(columns[-1]):
        raise ValueError(
            f"{path}, line {number}: the last column must be a label, O or such as B-PER (IOB1, IOB2, BIOES, BILOU), "
            f"got {columns[-1]!r}."
        )
    return columns[-1]


def write_conll(path: Path, sentences: list[Sentence]) -> None:
    """The sentences in IOB2: word and label, separated by a blank."""
    text = "\n".join(
        "".join(f"{word} {label}\n" for word, label in zip(one.words, one.labels, strict=True)) for one in sentences
    )
    path.write_text(text, encoding="utf-8")
