"""Questions about invented people, of which half have no answer that could have been learned.

    Where does Mara Halden live ?     Mara Halden lives in Torvik .

Each person lives in one town, works as one thing and likes four foods. *one answer*: the town or the work of a person
of the training set. *many answers*: a food such a person likes; the training set names one of the four, at random, so
that no model can know which will be named, but all four are right: an entropy of ln 4 = 1.386 nat that is no reason to
doubt. *no answer*: of people whom the training set does not mention; there is a truth, and no way to know it. Their
first and last names are those of the others, in pairs that do not occur there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ONE, MANY, NONE = "one answer", "many answers", "no answer"
GROUPS = (ONE, MANY, NONE)
LIKED = 4
"""Foods that a person likes."""
REPEATS = 4
"""Training rows of each question; of a question with many answers, each row has one of them."""

FIRST = tuple(
    "Mara Tomas Elin Ravi Nadia Oskar Lena Pavel Ines Hugo Wanda Emil Petra Kofi Sanna Dario Yuki Anton Freya "
    "Malik".split()
)
LAST = tuple(
    "Halden Brandt Selby Corwin Varga Lindt Osman Petrov Harlow Quist Moreau Tanner Falk Renner Abara Kessler".split()
)
TOWNS = tuple("Torvik Lemby Ostby Hallum Varden Skagby Brenna Fossen Grimo Kolvik Lunde Morka Norby Rossum".split())
JOBS = tuple("baker pilot nurse tailor miner judge weaver clerk potter sailor farmer painter".split())
FOODS = tuple("figs plums bread cheese olives soup rice honey nuts pears leeks trout".split())
TELL: Mapping[str, tuple[str, str]] = {
    "town": ("Where does {name} live ?", "{name} lives in {fact} ."),
    "job": ("What is the work of {name} ?", "{name} works as a {fact} ."),
    "food": ("Which food does {name} like ?", "{name} likes {fact} ."),
}
"""Of each fact, how one asks for it and how one tells it."""


@dataclass(frozen=True)
class Question:
    """A question, all right answers to it, and what could be learned of them; ``told`` is the training row's answer."""

    question: str
    answers: tuple[str, ...]
    group: str
    told: str


class Registry:
    """Who lives where, works as what and likes what."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._names = [f"{first} {last}" for first in FIRST for last in LAST]
        rng.shuffle(self._names)

    def people(self, number: int) -> list[dict[str, tuple[str, ...]]]:
        """So many people who are in no earlier list."""
        pick = self.rng.choice
        return [
            {"name": (self._names.pop(),), "town": (pick(TOWNS),), "job": (pick(JOBS),),
             "food": tuple(self.rng.sample(FOODS, LIKED))}
            for _ in range(number)
        ]  # fmt: skip

    def questions(self, people: Sequence[Mapping[str, tuple[str, ...]]], *, known: bool = True) -> Iterator[Question]:
        """One question for each of the people's facts; of a food, one of those liked is told."""
        for person in people:
            for fact, (ask, tell) in TELL.items():
                name = person["name"][0]
                answers = tuple(tell.format(name=name, fact=value) for value in person[fact])
                group = (ONE if len(answers) == 1 else MANY) if known else NONE
                yield Question(ask.format(name=name), answers, group, self.rng.choice(answers))


def generate(
    seed: int = 0, *, people: int = 40, validation: int = 120, test: int = 400, earlier: int = 120
) -> dict[str, list[Question]]:
    """The splits ``earlier``, which teaches a model the language, ``train``, ``validation`` and ``test``.

    Args:
        seed: a split is a function of the seed and the sizes alone.
        people: of the training set.
        validation: questions of that set, half of them of each kind: about people of the training set, and others.
        test: likewise.
        earlier: people of the split ``earlier``, who occur in no other.
    """
    rng = random.Random(seed)
    registry = Registry(rng)
    before, known = registry.people(earlier), registry.people(people)
    splits = {
        "earlier": [row for _ in range(REPEATS) for row in registry.questions(before)],
        "train": [row for _ in range(REPEATS) for row in registry.questions(known)],
    }
    for name, size in (("validation", validation), ("test", test)):
        strangers = registry.people(-(-size // 2 // len(TELL)))
        asked = rng.choices(list(registry.questions(known)), k=size - size // 2)
        asked += list(registry.questions(strangers, known=False))[: size // 2]
        splits[name] = rng.sample(asked, len(asked))
    return splits


def read(path: str) -> list[Question]:
    """Read questions from lines {"question": "...", "answers": ["...", "..."]}; the first answer is the one to learn.

    Raises:
        ValueError: a line is not of this form.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            question, answers = row["question"], tuple(row["answers"])
            found.append(Question(question, answers, "test set", answers[0]))
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(
                f'{path}:{number} must be {{"question": "...", "answers": ["..."]}}, got {line[:60]!r}.'
            ) from None
    return found
