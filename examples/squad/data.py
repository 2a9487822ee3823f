"""From the arguments to questions: SQuAD's official JSON (v1.1 and v2.0), split by article, or the written articles."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    """

    name: str
    train: list[Question]
    validation: list[Question]
    test: list[Question]
    shifted: list[Question] = field(default_factory=list)
    ambiguity: float | None = None

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
def load_data(args: DataArguments, seed: int) -> SquadData:
    """The sets that the arguments name.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files, or too few articles to split.
    """
    data = official_data(args, seed) if args.files else written_data(seed)
    if args.shifted_file is not None:
        questions = _all(read_squad(args.shifted_file))
        data = replace(data, shifted=[replace(question, group=SHIFTED) for question in questions])
    if not any(question.answers for question in data.train):
        raise ValueError("the training questions have no answer among them: a span head needs some.")
    return _limited(data, args)


def written_data(seed: int) -> SquadData:
    """The articles written on the spot; an ambiguous question has two right answers: an entropy of ln 2."""
    sets = {name: _all(parse_squad(content)) for name, content in write_articles(seed).items()}
    return SquadData("written articles", **sets, ambiguity=2.0)


def official_data(args: DataArguments, seed: int) -> SquadData:
    """The sets of the official files; what is not given is held out of the training file, by article."""
    files = args.files
    train = read_squad(files["train"])
    test = _all(read_squad(files["test"])) if "test" in files else None
    validation = _all(read_squad(files["validation"])) if "validation" in files else None
    missing = {"validation": validation is None, "test": test is None}
    shares = {"validation": args.validation_share, "test": args.test_share}
    kept, *held_out = split_articles(train, [shares[name] for name, is_missing in missing.items() if is_missing], seed)
    parts = dict(zip([name for name, is_missing in missing.items() if is_missing], held_out, strict=True))
    return SquadData(
        Path(files["train"]).stem,
        kept,
        parts["validation"] if validation is None else validation,
        parts["test"] if test is None else test,
    )


def _all(articles: Articles) -> list[Question]:
    return [question for questions in articles.values() for question in questions]


def _limited(data: SquadData, args: DataArguments) -> SquadData:
    train, others = args.max_train_samples, args.max_eval_samples
    limits = {"train": train, "validation": others, "test": others, "shifted": others}
    return replace(data, **{name: getattr(data, name)[:limit] for name, limit in limits.items()})
