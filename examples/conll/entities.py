"""Entities in label sequences: the tagging schemes, spans, and precision, recall and F1 as CoNLL-2003 defines them.

Inside the example every sequence is IOB2: ``B-PER I-PER O``. A predicted sequence need not be consistent, so spans are
read by the rule of the shared task's `conlleval`: an entity begins at a B, or at an I whose predecessor is of another
type or O. Tjong Kim Sang & De Meulder 2003 (aclanthology.org/W03-0419).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["IOB1", "IOB2", "IOB1 and IOB2 mixed", "BIOES", "BILOU"]
OUTSIDE = "O"
_WHOLE = {"BIOES": ("S", "E"), "BILOU": ("U", "L")}  # scheme -> prefixes of a single and of a last word


class Entity(NamedTuple):
    """Words start .. end - 1 of a sentence, and the type."""

    start: int
    end: int
    type: str


def split_label(label: str) -> tuple[str, str]:
    """Prefix and type of a label.

    >>> split_label("B-PER"), split_label("O")
    (('B', 'PER'), ('O', ''))
    """
    prefix, _, kind = label.partition("-")
    return prefix, kind


def is_label(label: str) -> bool:
    """Whether it is "O", or one of B, I, E, S, L, U with a type behind a hyphen."""
    prefix, kind = split_label(label)
    return label == OUTSIDE or (prefix in tuple("BIESLU") and kind != "")


def find_entities(labels: Sequence[str]) -> list[Entity]:
    """The entities of an IOB1 or IOB2 sequence, consistent or not.

    >>> find_entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-ORG"])
    [Entity(start=0, end=2, type='PER'), Entity(start=3, end=4, type='LOC'), Entity(start=4, end=5, type='LOC'),
     Entity(start=5, end=6, type='ORG')]
    """
    found: list[Entity] = []
    for position, (prefix, kind) in enumerate(map(split_label, labels)):
        if prefix == OUTSIDE:
            continue
        if prefix == "I" and found and found[-1].end == position and found[-1].type == kind:
            found[-1] = found[-1]._replace(end=position + 1)
        else:
            found.append(Entity(position, position + 1, kind))
    return found


def to_iob2(labels: Sequence[str]) -> list[str]:
    """The same entities in IOB2, from any of the schemes; BIOES and BILOU differ from it in their prefixes only.

    >>> to_iob2(["I-PER", "I-PER", "B-PER"]), to_iob2(["B-ORG", "E-ORG", "S-LOC"])
    (['B-PER', 'I-PER', 'B-PER'], ['B-ORG', 'I-ORG', 'B-LOC'])
    """
    plain = {"S": "B", "U": "B", "E": "I", "L": "I"}
    iob = []
    for prefix, kind in map(split_label, labels):
        iob.append(f"{plain.get(prefix, prefix)}-{kind}" if kind else OUTSIDE)
    written = [OUTSIDE] * len(labels)
    for entity in find_entities(iob):
        for position in range(entity.start, entity.end):
            written[position] = f"{'B' if position == entity.start else 'I'}-{entity.type}"
    return written


def detect_scheme(sequences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that label sequences are written in.

    E and S are BIOES, L and U are BILOU. Else, where an I begins an entity it is IOB1, where a B does so next to
    nothing of its own type it is IOB2; files that never show the difference are IOB2.

    Raises:
        ValueError: BIOES or BILOU with prefixes that contradict each other.
    """
    sequences = [list(map(split_label, labels)) for labels in sequences]
    prefixes = {prefix for labels in sequences for prefix, _ in labels}
    for scheme in ("BIOES", "BILOU"):
        if prefixes & set(_WHOLE[scheme]):
            _check_whole(sequences, scheme)
            return "BIOES" if scheme == "BIOES" else "BILOU"
    first, second = False, False
    for labels in sequences:
        for before, (prefix, kind) in zip([(OUTSIDE, ""), *labels], labels, strict=False):
            first |= prefix == "I" and before[1] != kind
            second |= prefix == "B" and before[1] != kind
    if first and second:
        return "IOB1 and IOB2 mixed"
    return "IOB1" if first else "IOB2"


def _check_whole(sequences: Sequence[Sequence[tuple[str, str]]], scheme: str) -> None:
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


def label_names(sequences: Iterable[Sequence[str]]) -> list[str]:
    """O, then B and I of every type in the sequences, by name.

    >>> label_names([["O", "B-PER"], ["B-LOC"]])
    ['O', 'B-LOC', 'I-LOC', 'B-PER', 'I-PER']
    """
    kinds = sorted({split_label(label)[1] for labels in sequences for label in labels} - {""})
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of exact matches of span and type; a ratio without a count is 0.

    >>> entity_scores([["B-PER", "I-PER", "B-LOC"]], [["B-PER", "I-PER", "B-ORG"]])
    {'precision': 0.5, 'recall': 0.5, 'f1': 0.5}
    """
    pairs = list(zip(gold, predicted, strict=True))
    if any(len(one) != len(other) for one, other in pairs):
        raise ValueError("`gold` and `predicted` must have sentences of the same lengths.")
    matches = [(set(find_entities(one)), set(find_entities(other))) for one, other in pairs]
    correct = sum(len(one & other) for one, other in matches)
    num_gold, num_found = (sum(len(pair[side]) for pair in matches) for side in (0, 1))
    return {
        "precision": correct / num_found if num_found else 0.0,
        "recall": correct / num_gold if num_gold else 0.0,
        "f1": 2 * correct / (num_gold + num_found) if num_gold + num_found else 0.0,
    }
