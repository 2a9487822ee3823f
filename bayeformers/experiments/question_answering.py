"""Questions about texts as an experiment sees them: what trains, what is held out of it, and what results are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..tasks.squad import Question, parse_squad, read_squad, split_articles
from .arguments import HoldOutArguments, flag
from .rows import FRESH, Hashes, History, Split, TrainingRows, row_hashes
from .splits import RowKind, hold_out

SOURCES = ("data_dir", "train_file", "split_by_article")
"""The flags that name official files; without one the questions are written by the experiment itself."""


@dataclass
class SquadArguments(HoldOutArguments):
    """Which questions, and how long texts and answers may be."""

    data_dir: str | None = flag(
        None, "Folder of the official train-v*.json and dev-v*.json; dev is reported as the test set."
    )
    train_file: str | None = flag(None, "Training questions: SQuAD's JSON, v1.1 or v2.0.")
    validation_file: str | None = flag(
        None,
        "Questions that choose epochs, delta and temperature, if there is a --test_file; else those that "
        "are reported, such as the official dev set. What chooses is then held out of train, by article.",
    )
    test_file: str | None = flag(None, "Questions that are reported and choose nothing.")
    split_by_article: str | None = flag(
        None, "One file for all: its articles are dealt out by --validation_share, --test_share, --seed."
    )
    shifted_file: str | None = flag(None, "More questions to report on, of another kind than those trained on.")
    validation_share: float = flag(0.2, "Share of questions, in whole articles, that validation is given of train.")
    test_share: float = flag(0.2, "The same for the test set of --split_by_article.")
    max_seq_length: int = flag(384, "Tokens of question and text together; a longer text is read in windows.")
    doc_stride: int = flag(128, "Tokens of the text that two windows share.")
    max_answer_length: int = flag(30, "Longest answer in tokens; at most --doc_stride, so that one window holds it.")

    def __post_init__(self) -> None:
        """Refuse sources that exclude each other, and lengths that would cut answers."""
        super().__post_init__()
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        others = [name for name in ("validation_file", "test_file") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"`data_dir`, `train_file` and `split_by_article` exclude each other, got {sources}.")
        if others and sources != ["train_file"]:
            raise ValueError(f"`{others[0]}` {getattr(self, others[0])!r} needs a `train_file`.")
        if sources == ["train_file"] and not others:
            raise ValueError(
                f"`train_file` {self.train_file!r} needs a `validation_file` or a `test_file` to report on; "
                "--split_by_article makes all three of one file."
            )
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"`{name}` must lie between 0 and 0.5, got {getattr(self, name)}.")
        if not 0 < self.max_answer_length <= self.doc_stride < self.max_seq_length:
            raise ValueError(
                "`max_answer_length`, `doc_stride` and `max_seq_length` must be 0 < answer <= stride < sequence, got "
                f"{self.max_answer_length}, {self.doc_stride} and {self.max_seq_length}: an answer must fit into what "
                "two windows share, or it could be cut in both."
            )

    @property
    def files(self) -> dict[str, str]:
        """The official files by set; none: the experiment writes its questions itself."""
        if self.data_dir is not None:
            return {"train": _official(self.data_dir, "train"), "test": _official(self.data_dir, "dev")}
        validation, test = (self.validation_file, self.test_file) if self.test_file else (None, self.validation_file)
        named = {"train": self.train_file or self.split_by_article, "validation": validation, "test": test}
        return {name: path for name, path in named.items() if path is not None}


def _official(folder: str, split: str) -> str:
    files = sorted(Path(folder).glob(f"{split}-v*.json"))
    if not files:
        raise FileNotFoundError(f"`data_dir` {folder} has no {split}-v1.1.json or {split}-v2.0.json.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"`data_dir` {folder} has {names}: say which by --train_file and --validation_file.")
    return str(files[0])


@dataclass(frozen=True)
class SquadData:
    """Questions to train on and to report on.

    Attributes:
        name: of the data, for reports.
        sets: "train" and "validation", which fit and choose; "test" and perhaps "shifted", which are only reported.
        rows: the record of a model that this run saves; None where it cannot be known.
    """

    name: str
    sets: dict[str, list[Question]]
    rows: TrainingRows | None = None

    @property
    def reported(self) -> dict[str, list[Question]]:
        """The sets that results are about."""
        return {name: self.sets[name] for name in ("test", "shifted") if name in self.sets}

    @property
    def asks_unanswerable(self) -> bool:
        """Whether training has questions without an answer, so that "no answer" is an option."""
        return any(not question.answers for question in self.sets["train"])


def load_squad_data(
    args: SquadArguments, seed: int, history: History = FRESH, *, written: Callable[[int], Mapping[str, Any]]
) -> SquadData:
    """Return the sets that the arguments name, split by ``seed``, or as the model that the run starts from was.

    Args:
        args: the arguments.
        seed: the run's.
        history: what is known of the rows which that model was trained on.
        written: from a seed to SQuAD's JSON of each set, where no file is named.

    Raises:
        ValueError: No training question has an answer. Missing or malformed files, too few articles to split, and
            held-out questions that the model has seen, or may have, are errors too.
    """
    files = args.files
    articles = {name: read_squad(path) for name, path in files.items()}
    shifted = _all(read_squad(args.shifted_file)) if args.shifted_file is not None else []

    def make(split: Split) -> dict[str, list[Question]]:
        if not files:
            sets = {name: _all(parse_squad(content)) for name, content in written(split.seed).items()}
        else:
            missing = [name for name in ("validation", "test") if name not in files]
            shares = [split.settings[f"{name}_share"] for name in missing]
            parts = dict(zip(["train", *missing], split_articles(articles["train"], shares, split.seed), strict=True))
            sets = {
                name: parts[name] if name in parts else _all(articles[name]) for name in ("train", "validation", "test")
            }
            sets["train"] = sets["train"][: split.settings["max_train_samples"]]
        return {**sets, "shifted": [replace(question, group="shifted") for question in shifted]} if shifted else sets

    def hashes(questions: list[Question]) -> Hashes:
        return row_hashes(f"{question.text}\x1f{question.context}" for question in questions)

    sets, rows = hold_out(
        make, args, seed, history, RowKind("squad", "Questions", hashes),
        source=hashes(_all(articles["train"])) if files else None,
        settings={name: getattr(args, name) for name in ("validation_share", "test_share", "max_train_samples")},
        held_out=("validation", "test"), given=files,
    )  # fmt: skip
    if not any(question.answers for question in sets["train"]):
        raise ValueError("the training questions have no answer among them: a span head needs some.")
    return SquadData(Path(files["train"]).stem if files else "written articles", sets, rows)


def _all(articles: Mapping[str, list[Question]]) -> list[Question]:
    return [question for questions in articles.values() for question in questions]
