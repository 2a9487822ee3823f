"""SQuAD: questions in its official JSON files (v1.1, v2.0), splits by whole articles, and its official scores.

Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822).
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

ANSWERABLE, UNANSWERABLE = "answerable", "unanswerable"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SHAPE = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'


@dataclass(frozen=True)
class Question:
    """A question, and the text ``context`` that answers it.

    ``answers`` are each annotator's (first character in ``context``, text), none of an unanswerable question; ``group``
    is for reports, "answerable" or "unanswerable" if the file says nothing else.
    """

    id: str
    text: str
    context: str
    answers: tuple[tuple[int, str], ...]
    group: str

    @property
    def truths(self) -> list[str]:
        """The texts of the annotators' answers."""
        return [text for _, text in self.answers]


Articles = dict[str, list[Question]]
"""Questions by the title of their article."""


def read_squad(path: str | PathLike[str]) -> Articles:
    """Return the questions of an official SQuAD file by article, in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not SQuAD's JSON, or an answer is not at its place in the text.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a SQuAD file such as train-v2.0.json is needed.")
    try:
        return parse_squad(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not in SQuAD's format, {_SHAPE}: {type(error).__name__}: {error}.") from None
    except ValueError as error:  # of json, and of `parse_squad`
        raise ValueError(f"{file}: {error}") from None


def parse_squad(content: Mapping[str, Any]) -> Articles:
    """Return the questions in SQuAD's JSON by article; v1.1 has no ``is_impossible``.

    Raises:
        ValueError: There is no question, or an answer is not at its place in the text.
    """
    articles: Articles = {}
    for article in content["data"]:
        questions = articles.setdefault(str(article.get("title", f"article {len(articles)}")), [])
        for paragraph in article["paragraphs"]:
            questions.extend(_question(row, paragraph["context"]) for row in paragraph["qas"])
    if not any(articles.values()):
        raise ValueError("there is no question in it.")
    return articles


def _question(row: Mapping[str, Any], context: str) -> Question:
    """The answers that v2.0 calls plausible are none."""
    answers = () if row.get("is_impossible", False) else tuple((a["answer_start"], a["text"]) for a in row["answers"])
    for start, text in answers:
        if (found := context[start : start + len(text)]) != text:
            where = f"must be where {text!r} begins in its context"
            raise ValueError(f"`answer_start` {start} of question {row['id']} {where}, got {found!r}.")
    group = row.get("group", ANSWERABLE if answers else UNANSWERABLE)
    return Question(row["id"], row["question"].strip(), context, answers, group)


def split_articles(articles: Articles, shares: Sequence[float], seed: int) -> list[list[Question]]:
    """Return 1 + ``len(shares)`` parts of whole articles, in an order that ``seed`` shuffles: no text lies in two.

    Args:
        articles: the questions by article.
        shares: of all questions, of the parts behind the first, which takes the rest. Each part gets one article at
            least; an article goes to the part that is furthest below its share.
        seed: of the order.

    Raises:
        ValueError: There are fewer articles than parts.
    """
    wanted = [1 - sum(shares), *shares]
    if len(articles) < len(wanted):
        raise ValueError(
            f"{len(articles)} article(s) cannot be split into {len(wanted)} parts: {', '.join(articles)}. "
            "Give the other parts files of their own."
        )
    titles = sorted(articles)
    random.Random(seed).shuffle(titles)
    parts: list[list[Question]] = [[] for _ in wanted]
    total = sum(map(len, articles.values()))
    for left, title in zip(range(len(titles), 0, -1), titles, strict=True):
        empty = [index for index, part in enumerate(parts) if not part]
        candidates = empty if len(empty) == left else range(len(parts))
        furthest = max(candidates, key=lambda i: wanted[i] - len(parts[i]) / total)
        parts[furthest] += articles[title]
    return parts


# --- The official evaluation script's scores (v2.0) -------------------------------------------------------------------
def normalized(text: str) -> str:
    """Return the text in lower case without punctuation, articles and superfluous spaces.

    >>> normalized("The  Norman's,  a Duke")
    'normans duke'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Return 1 if the normalised answer is one of ``truths``, else 0; without truths the right answer is "".

    >>> exact_match("the Denver Broncos", ["Denver Broncos"]), exact_match("", []), exact_match("Denver", [])
    (1.0, 1.0, 0.0)
    """
    return _best(answer, truths, lambda given, truth: float(normalized(given) == normalized(truth)))


def f1(answer: str, truths: Sequence[str]) -> float:
    """Return 2 P R / (P + R) of the normalised words that the answer shares with a truth, the best over ``truths``.

    >>> round(f1("February 7", ["February 7, 2016", "2016"]), 4)
    0.8
    """
    return _best(answer, truths, _f1)


def _best(answer: str, truths: Sequence[str], score: Callable[[str, str], float]) -> float:
    """The official script drops truths that normalise to nothing; where none is left, "" is the truth."""
    return max(score(answer, truth) for truth in [truth for truth in truths if normalized(truth)] or [""])


def _f1(answer: str, truth: str) -> float:
    given, wanted = normalized(answer).split(), normalized(truth).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))  # 2 P R / (P + R), and 0 where nothing is shared
