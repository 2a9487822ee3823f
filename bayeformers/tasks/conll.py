"""Files in the format of the CoNLL shared tasks: a word per line, its label in the last column, sentences apart.

Labels mark entities in one of several schemes; read files have IOB2: ``B-PER I-PER O``. A predicted sequence need not
be consistent, so entities are read by the rule of the shared task's `conlleval`: one begins at a B, or at an I whose
predecessor is of another type or O. Tjong Kim Sang & De Meulder 2003 (aclanthology.org/W03-0419).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple

Scheme = Literal["IOB1", "IOB2", "IOB1 and IOB2 mixed", "BIOES", "BILOU"]
OUTSIDE = "O"
DOCUMENT = "-DOCSTART-"
# prefixes of an entity of one word and of a last word
_WHOLE: dict[Scheme, tuple[str, str]] = {"BIOES": ("S", "E"), "BILOU": ("U", "L")}


class Entity(NamedTuple):
    """Words start .. end - 1 of a sentence, and the type."""

    start: int
    end: int
    type: str


@dataclass(frozen=True)
class Sentence:
    """Words and their IOB2 labels; for reports, the kind of sentence, and which words' labels were drawn at random."""

    words: tuple[str, ...]
    labels: tuple[str, ...]
    group: str = "in-domain"
    ambiguous: tuple[int, ...] = ()


# --- Labels ----------------------------------------------------------------------------------------------------------
def split_label(label: str) -> tuple[str, str]:
    """Return prefix and type of a label.

    >>> split_label("B-PER"), split_label("O")
    (('B', 'PER'), ('O', ''))
    """
    prefix, _, kind = label.partition("-")
    return prefix, kind


def is_label(label: str) -> bool:
    """Whether it is "O", or one of B, I, E, S, L, U with a type behind a hyphen."""
    prefix, kind = split_label(label)
    return label == OUTSIDE or (prefix in tuple("BIESLU") and kind != "")


def label_names(sequences: Iterable[Sequence[str]]) -> list[str]:
    """Return O, then B and I of every type in the sequences, by name.

    >>> label_names([["O", "B-PER"], ["B-LOC"]])
    ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    kinds = sorted({split_label(label)[1] for labels in sequences for label in labels} - {""})
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def find_entities(labels: Sequence[str]) -> list[Entity]:
    """Return the entities of an IOB1 or IOB2 sequence, consistent or not.

    >>> find_entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG"])
    [Entity(start=0, end=2, type='PER'), Entity(start=3, end=4, type='LOC'), Entity(start=4, end=5, type='LOC'),
     Entity(start=5, end=6, type='ORG')]
    """
    entities: list[Entity] = []
    for position, (prefix, kind) in enumerate(map(split_label, labels)):
        if prefix == OUTSIDE:
            continue
        if prefix == "I" and entities and entities[-1].end == position and entities[-1].type == kind:
            entities[-1] = entities[-1]._replace(end=position + 1)
        else:
            entities.append(Entity(position, position + 1, kind))
    return entities


def to_iob2(labels: Sequence[str]) -> list[str]:
    """Return the same entities in IOB2, from any of the schemes; BIOES and BILOU differ from it in their prefixes only.

    >>> to_iob2(["I-PER", "I-PER", "B-PER"]), to_iob2(["B-ORG", "E-ORG", "S-LOC"])
    (['B-PER', 'I-PER', 'B-PER'], ['B-ORG', 'I-ORG', 'B-LOC'])
    """
    plain = {"S": "B", "U": "B", "E": "I", "L": "I"}
    iob = [f"{plain.get(prefix, prefix)}-{kind}" if kind else OUTSIDE for prefix, kind in map(split_label, labels)]
    written = [OUTSIDE] * len(labels)
    for entity in find_entities(iob):
        for position in range(entity.start, entity.end):
            written[position] = f"{'B' if position == entity.start else 'I'}-{entity.type}"
    return written


def detect_scheme(sequences: Iterable[Sequence[str]]) -> Scheme:
    """Return the scheme that label sequences are written in.

    E and S are BIOES, L and U are BILOU; prefixes of theirs that contradict each other are a `ValueError`. Else, where
    an I begins an entity it is IOB1, where a B does so next to nothing of its own type it is IOB2; files that never
    show the difference are IOB2.
    """
    split = [[split_label(label) for label in labels] for labels in sequences]
    prefixes = {prefix for labels in split for prefix, _ in labels}
    for scheme, letters in _WHOLE.items():
        if prefixes & set(letters):
            _check_whole(split, scheme)
            return scheme
    first = second = False
    for labels in split:
        for before, (prefix, kind) in zip([(OUTSIDE, ""), *labels], labels, strict=False):
            first |= prefix == "I" and before[1] != kind
            second |= prefix == "B" and before[1] != kind
    if first and second:
        return "IOB1 and IOB2 mixed"
    return "IOB1" if first else "IOB2"


def _check_whole(sequences: Sequence[Sequence[tuple[str, str]]], scheme: Scheme) -> None:
    """B, I go on with I, E of their type and nothing else does; ``E`` and ``S`` stand for the scheme's own letters."""
    single, last = _WHOLE[scheme]
    allowed = {OUTSIDE, "B", "I", single, last}
    for number, labels in enumerate(sequences, start=1):
        padded = [(OUTSIDE, ""), *labels, (OUTSIDE, "")]
        for (before, kind_before), (prefix, kind) in zip(padded[:-1], padded[1:], strict=True):
            is_open, goes_on = before in ("B", "I"), prefix in ("I", last)
            if prefix not in allowed or is_open != goes_on or (is_open and kind_before != kind):
                pair = " ".join(f"{a}-{b}" if b else a for a, b in ((before, kind_before), (prefix, kind)))
                raise ValueError(f"sentence {number} is not {scheme}: it has {pair!r}.")


# --- Files -----------------------------------------------------------------------------------------------------------
def read_conll(path: str | PathLike[str]) -> tuple[list[Sentence], Scheme]:
    """Return the sentences of a file, in IOB2, and the scheme that it was written in.

    Columns are separated by blanks or tabs; the first is the word and the last its label. Empty lines and lines that
    begin with ``-DOCSTART-`` end a sentence. Other columns are ignored.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: A line with one column, labels of no known scheme, or no sentence; the message names the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    sentences = list(_sentences(Path(path)))
    if not sentences:
        raise ValueError(f"{path} has no sentence.")
    try:
        scheme = detect_scheme([labels for _, labels in sentences])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [Sentence(tuple(words), tuple(to_iob2(labels))) for words, labels in sentences], scheme


def _sentences(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    words: list[str] = []
    labels: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(chain(file, [""]), start=1):
            columns = [column for column in re.split("[ \t]+", line.rstrip("\n")) if column]
            if columns and not columns[0].startswith(DOCUMENT):
                words.append(columns[0])
                labels.append(_label(columns, f"{path}, line {number}"))
            elif words:
                yield words, labels
                words, labels = [], []


def _label(columns: list[str], place: str) -> str:
    if len(columns) < 2:
        raise ValueError(f"{place}: a word and its label are needed, got {columns[0]!r} alone.")
    if not is_label(columns[-1]):
        needed = "a label, O or such as B-PER (IOB1, IOB2, BIOES, BILOU)"
        raise ValueError(f"{place}: the last column must be {needed}, got {columns[-1]!r}.")
    return columns[-1]


def write_conll(path: str | PathLike[str], sentences: Iterable[Sentence]) -> None:
    """Write the sentences in IOB2: word and label, separated by a blank."""
    pairs = (zip(one.words, one.labels, strict=True) for one in sentences)
    text = "\n".join("".join(f"{word} {label}\n" for word, label in of) for of in pairs)
    Path(path).write_text(text, encoding="utf-8")
