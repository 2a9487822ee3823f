"""From the arguments to questions: SQuAD's official JSON (v1.1 and v2.0), split by article, or the written articles."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.held_out import (
    FRESH,
    Hashes,
    History,
    Split,
    TrainingRows,
    check_known,
    check_split_seed,
    fingerprint,
    row_hashes,
    say_split,
    unseen_sets,
)
from examples.squad.arguments import DataArguments
from examples.squad.articles import ANSWERABLE, SHIFTED, UNANSWERABLE, write_articles


@dataclass(frozen=True)
class Question:
    """A question about a text; ``answers`` are its annotators' spans as (first character, text), none if unanswerable.

    ``group`` says what kind of question it is, for the report.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[int, str], ...]
    group: str

    @property
    def truths(self) -> list[str]:
        return [text for _, text in self.answers]


@dataclass(frozen=True)
class SquadData:
    """Fitting and stopping see `train` and `validation` alone; `test` and `shifted` are only reported.

    ``asks_unanswerable``: whether training has questions without an answer, so that "no answer" is an option.
    ``rows``: the record of a model that this run saves; None where it cannot be known.
    """

    name: str
    train: list[Question]
    validation: list[Question]
    test: list[Question]
    shifted: list[Question] = field(default_factory=list)
    ambiguity: float | None = None
    rows: TrainingRows | None = None

    @property
    def asks_unanswerable(self) -> bool:
        return any(not question.answers for question in self.train)

    @property
    def reported(self) -> dict[str, list[Question]]:
        return {"test": self.test, **({"shifted": self.shifted} if self.shifted else {})}

    @property
    def sets(self) -> dict[str, list[Question]]:
        return {"train": self.train, "validation": self.validation, **self.reported}


# --- Official JSON ---------------------------------------------------------------------------------------------------
Articles = dict[str, list[Question]]
"""By title."""


def read_squad(path: str | Path) -> Articles:
    """The questions of an official SQuAD file by article, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not SQuAD's JSON, or an answer is not at its place in the text.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a SQuAD file such as train-v2.0.json is needed.")
    try:
        return parse_squad(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError) as error:
        shape = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'
        raise ValueError(f"{file} is not in SQuAD's format, {shape}: {type(error).__name__}: {error}.") from None
    except ValueError as error:  # of json, and of `parse_squad`
        raise ValueError(f"{file}: {error}") from None


def parse_squad(content: Mapping[str, Any]) -> Articles:
    """The questions in SQuAD's JSON by article; v1.1 has no ``is_impossible``."""
    articles: Articles = {}
    for article in content["data"]:
        found = articles.setdefault(str(article.get("title", f"article {len(articles)}")), [])
        for paragraph in article["paragraphs"]:
            found.extend(_question(row, paragraph["context"]) for row in paragraph["qas"])
    if not any(articles.values()):
        raise ValueError("there is no question in it.")
    return articles


def _question(row: Mapping[str, Any], context: str) -> Question:
    """The answers that v2.0 calls plausible are none."""
    answers = () if row.get("is_impossible", False) else tuple((a["answer_start"], a["text"]) for a in row["answers"])
    for start, text in answers:
        if context[start : start + len(text)] != text:
            raise ValueError(
                f"`answer_start` {start} of question {row['id']} must be where {text!r} begins in its context, got "
                f"{context[start : start + len(text)]!r}."
            )
    group = row.get("group", ANSWERABLE if answers else UNANSWERABLE)
    return Question(row["id"], row["question"].strip(), context, answers, group)


def split_articles(articles: Articles, shares: Sequence[float], seed: int) -> list[list[Question]]:
    """The articles in an order that ``seed`` shuffles, dealt out: ``shares`` of all questions each, and the rest first.

    Whole articles, at least one to each part; an article goes to the part that is furthest below its share.

    Raises:
        ValueError: fewer articles than parts.
    """
    wanted = [1 - sum(shares), *shares]
    if len(articles) < len(wanted):
        raise ValueError(
            f"{len(articles)} article(s) cannot be split into {len(wanted)} parts: {', '.join(articles)}. "
            "Give the other parts by --test_file or --validation_file."
        )
    titles = sorted(articles)
    random.Random(seed).shuffle(titles)
    parts: list[list[Question]] = [[] for _ in wanted]
    total = sum(map(len, articles.values()))
    for left, title in zip(range(len(titles), 0, -1), titles, strict=True):
        empty = [index for index, part in enumerate(parts) if not part]
        open_ = empty if len(empty) == left else range(len(parts))
        index = max(open_, key=lambda i: wanted[i] - len(parts[i]) / total)
        parts[index] += articles[title]
    return parts


# --- The sets --------------------------------------------------------------------------------------------------------
def load_data(args: DataArguments, seed: int, history: History = FRESH) -> SquadData:
    """The sets that the arguments name, split by `seed`, or as the model that the run starts from was.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files, too few articles to split, or held-out questions that
            the model has seen, or may have.
    """
    settings = {name: getattr(args, name) for name in ("validation_share", "test_share", "max_train_samples")}
    own = Split(seed if args.split_seed is None else args.split_seed, settings)
    history = replace(history, unknown="") if args.split_seed is not None else history
    if args.validation_file is None or args.test_file is None:
        check_known(history)
    data, source, split = official_data(args, own, history) if args.files else written_data(own, history)
    check_split_seed(args.split_seed, split)
    say_split("Questions", own, split)
    if args.shifted_file is not None:
        questions = _all(read_squad(args.shifted_file))
        data = replace(data, shifted=[replace(question, group=SHIFTED) for question in questions])
    if not any(question.answers for question in data.train):
        raise ValueError("the training questions have no answer among them: a span head needs some.")
    train, held_out = hashes_of(data.train), {name: getattr(data, name) for name in ("validation", "test")}
    hashes = {name: hashes_of(questions) for name, questions in held_out.items()}
    kept = unseen_sets(history, train, hashes, given=args.files)
    data = replace(data, **{name: [held_out[name][i] for i in rows] for name, rows in kept.items()})
    return replace(_limited(data, args), rows=history.after("squad", source, split, train))


def hashes_of(questions: Sequence[Question]) -> Hashes:
    """Of each question and its text."""
    return row_hashes(f"{question.text}\x1f{question.context}" for question in questions)


Found = tuple[SquadData, str, Split]
"""The sets, the fingerprint of what they were split from, and how."""


def written_data(own: Split, history: History) -> Found:
    """The articles written on the spot; an ambiguous question has two right answers: an entropy of ln 2."""
    for split in (own if history.record is None else history.record.split, own):
        sets = {name: _all(parse_squad(content)) for name, content in write_articles(split.seed).items()}
        source = fingerprint(hashes_of(sets["train"]))
        if history.record is None or history.record.source == source:
            break
    return SquadData("written articles", **sets, ambiguity=2.0), source, split


def official_data(args: DataArguments, own: Split, history: History) -> Found:
    """The sets of the official files; what is not given is held out of the training file, by article."""
    files = args.files
    train = read_squad(files["train"])
    source = fingerprint(hashes_of(_all(train)))
    split = history.split(own, source)
    test = _all(read_squad(files["test"])) if "test" in files else None
    validation = _all(read_squad(files["validation"])) if "validation" in files else None
    missing = {"validation": validation is None, "test": test is None}
    shares = [split.settings[f"{name}_share"] for name, is_missing in missing.items() if is_missing]
    kept, *held_out = split_articles(train, shares, split.seed)
    parts = dict(zip([name for name, is_missing in missing.items() if is_missing], held_out, strict=True))
    data = SquadData(
        Path(files["train"]).stem,
        kept[: split.settings["max_train_samples"]],
        parts["validation"] if validation is None else validation,
        parts["test"] if test is None else test,
    )
    return data, source, split


def _all(articles: Articles) -> list[Question]:
    return [question for questions in articles.values() for question in questions]


def _limited(data: SquadData, args: DataArguments) -> SquadData:
    train, others = args.max_train_samples, args.max_eval_samples
    limits = {"train": train, "validation": others, "test": others, "shifted": others}
    return replace(data, **{name: getattr(data, name)[:limit] for name, limit in limits.items()})
