"""TREC: which of six kinds of answer a question asks for.

Li & Roth 2002 (aclanthology.org/C02-1150). A line of the official files is ``COARSE:fine question``; the label is the
coarse kind. They are in Latin-1, copies of them often in UTF-8.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from .glue import Split, TsvLayout, accuracy
from .text import HubCopy, TextTask

KINDS: tuple[str, ...] = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
"""Abbreviation, description, entity, human, location, number: by name, which is the order of the labels."""
FILES = {"train": "train.txt", "validation": "test.txt"}


def read_trec(directory: str | PathLike[str]) -> dict[str, Split]:
    """Return the splits of the folder of `train.txt` and `test.txt`: ``train``, and the test file as ``validation``.

    Raises:
        FileNotFoundError: one of the two is missing.
    """
    return {split: read_questions(Path(directory) / name) for split, name in FILES.items()}


def read_questions(path: str | PathLike[str]) -> Split:
    r"""Return the columns ``"text"`` and ``"label"``, a position in `KINDS`, of one file in the official layout.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no rows, or a line that is not ``COARSE:fine question``; the message names the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "train.txt").write_text("LOC:city Where is Sparta ?\n")
    ...     read_questions(Path(folder) / "train.txt")
    {'text': ['Where is Sparta ?'], 'label': [4]}
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(other.name for other in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist. Text files in its folder: {', '.join(beside) or 'none'}.")
    split: Split = {"text": [], "label": []}
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        kind, _, question = line.rstrip("\r").partition(" ")
        coarse, colon, fine = kind.partition(":")
        if not (colon and fine and question.strip()):
            raise ValueError(f"{path}, line {number}: expected 'COARSE:fine question', got {line[:60]!r}.")
        if coarse not in KINDS:
            raise ValueError(f"{path}, line {number}: label {coarse!r} is not one of {', '.join(map(repr, KINDS))}.")
        split["text"].append(question.strip())
        split["label"].append(KINDS.index(coarse))
    if not split["label"]:
        raise ValueError(f"{path} holds no questions.")
    return split


def _text(path: Path) -> str:
    """Of UTF-8 where it is that. Every byte is a letter of Latin-1, whose accents alone are never valid UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


TREC = TextTask(
    name="trec",
    columns=("text",),
    label_names=KINDS,
    label_values=KINDS,
    metrics=(accuracy,),
    tsv=TsvLayout(directory="trec", columns=("text",), label="label"),
    read=read_trec,
    files=", ".join(FILES.values()),
    hub=HubCopy(name="CogComp/trec", revision="refs/convert/parquet", label="coarse_label", validation="test"),
)
"""The row of `TEXT_TASKS`."""
