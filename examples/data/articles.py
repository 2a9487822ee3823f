"""A question-answering set in SQuAD's format, written from templates, whose uncertainties are known.

Each article tells three of five things about an invented person, in one of several wordings:

    In 1931 Ada moved to Lemby. Ada taught music in Ostby from 1925 to 1936 and after that in Hallum. For botany Ada was
    given a prize in 1912.

Its questions are of three kinds. *answerable*: about what is told. *unanswerable*: about what is not, though words of
the right sort stand there (When was Ada born?). *ambiguous*: where somebody taught who did so in two towns; both are
right, an annotator names either, and no model can know which: an entropy of ln 2 = 0.693 nat. Training questions carry
one annotator's answer, all others both.

*shifted* questions are asked in words never seen in training, about people and towns never seen in training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ANSWERABLE, UNANSWERABLE, AMBIGUOUS, SHIFTED = "answerable", "unanswerable", "ambiguous", "shifted"
GROUPS = (ANSWERABLE, AMBIGUOUS, UNANSWERABLE)
"""Of the test set, in the order of reports."""
TOLD = 3
"""Facts in one article."""
TWO_SCHOOLS = 0.7
"""Share of teachers who taught in two towns."""


@dataclass(frozen=True)
class World:
    """Who, where, and how one asks: one of several wordings for each question."""

    names: tuple[str, ...]
    towns: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]


KNOWN = World(
    tuple("Ada Bo Carl Dora Edda Finn Greta Hugo Ida Jon Karin Lars".split()),
    tuple("Torvik Lemby Ostby Hallum Varden Skagby Brenna Fossen Grimo Kolvik Lunde Morka Norby Rossum Solvik".split()),
    {
        "birthplace": ("Where was {name} born?", "What is the birthplace of {name}?"),
        "birthyear": ("When was {name} born?", "What is the year of birth of {name}?"),
        "destination": ("Where did {name} move?", "To which town did {name} move?"),
        "departure": ("When did {name} move?", "In which year did {name} move?"),
        "school": ("Where did {name} teach?", "In which town did {name} teach?"),
        "subject": ("What did {name} teach?", "Which subject did {name} teach?"),
        "spouse": ("Whom did {name} marry?", "Who married {name}?"),
        "wedding": ("When did {name} marry?", "In which year did {name} marry?"),
        "art": ("What was the prize of {name} for?", "For what was {name} given a prize?"),
        "victory": ("When did {name} win a prize?", "In which year was {name} given a prize?"),
    },
)
UNSEEN = World(
    tuple("Abel Birk Celia Dag Elin Frida Gorm Hedda Ivar Jarle".split()),
    tuple("Aldby Bergum Dalen Elvik Flatby Hovden Isby Krokum Myrvik Sandby".split()),
    {
        "birthplace": ("In what town did {name} come into the world?",),
        "birthyear": ("Of which year is {name}?",),
        "destination": ("For which town did {name} leave home?",),
        "departure": ("In which year did {name} leave home?",),
        "school": ("Which town had {name} for a teacher?",),
        "subject": ("{name} was a teacher of what?",),
        "spouse": ("Who was the wife or husband of {name}?",),
        "wedding": ("Of which year is the wedding of {name}?",),
        "art": ("{name} was honoured for what?",),
        "victory": ("In what year was {name} honoured?",),
    },
)
YEARS = tuple(str(year) for year in range(1900, 1950))
SUBJECTS = tuple("music history physics drawing chess botany".split())


# --- Facts: a sentence, and the spans in it that answer --------------------------------------------------------------
@dataclass(frozen=True)
class Fact:
    """One sentence; ``answers`` holds, by question, the spans of the sentence that are right."""

    sentence: str
    answers: dict[str, tuple[str, ...]]


class Chronicler:
    """Draws what happened to ``name``; every kind of fact below asks it for its parts."""

    def __init__(self, rng: random.Random, world: World) -> None:
        self.rng = rng
        self.world = world
        self.name = rng.choice(world.names)

    def town(self) -> str:
        return self.rng.choice(self.world.towns)

    def year(self) -> str:
        return self.rng.choice(YEARS)

    def period(self) -> str:
        first, last = sorted(self.rng.sample(YEARS, 2))
        return f"from {first} to {last}"

    def subject(self) -> str:
        return self.rng.choice(SUBJECTS)

    def say(self, *wordings: str) -> str:
        return self.rng.choice(wordings)


def birth(of: Chronicler) -> Fact:
    """Ada was born in Torvik in 1931."""
    name, town, year = of.name, of.town(), of.year()
    sentence = of.say(f"{name} was born in {town} in {year}.", f"In {year} {name} was born in {town}.")
    return Fact(sentence, {"birthplace": (town,), "birthyear": (year,)})


def move(of: Chronicler) -> Fact:
    """In 1944 Ada moved to Lemby."""
    name, town, year = of.name, of.town(), of.year()
    sentence = of.say(f"In {year} {name} moved to {town}.", f"{name} moved to {town} in {year}.")
    return Fact(sentence, {"destination": (town,), "departure": (year,)})


def school(of: Chronicler) -> Fact:
    """Ada taught music in Ostby from 1920 to 1926, or so in two towns, further apart than answers are long."""
    first, second = of.rng.sample(of.world.towns, 2)
    subject, path = of.subject(), f"in {first} {of.period()}"
    if of.rng.random() < TWO_SCHOOLS:
        sentence = f"{of.name} taught {subject} {path} and after that in {second}."
        return Fact(sentence, {"school": (first, second), "subject": (subject,)})
    return Fact(f"{of.name} taught {subject} {path}.", {"school": (first,), "subject": (subject,)})


def wedding(of: Chronicler) -> Fact:
    """Ada married Bo in 1930."""
    year, spouse = of.year(), of.rng.choice([name for name in of.world.names if name != of.name])
    sentence = of.say(f"{of.name} married {spouse} in {year}.", f"In {year} {spouse} married {of.name}.")
    return Fact(sentence, {"spouse": (spouse,), "wedding": (year,)})


def prize(of: Chronicler) -> Fact:
    """Ada won a prize for chess in 1912."""
    year, art = of.year(), of.subject()
    sentence = of.say(
        f"{of.name} won a prize for {art} in {year}.", f"For {art} {of.name} was given a prize in {year}."
    )
    return Fact(sentence, {"art": (art,), "victory": (year,)})


FACTS: dict[Callable[[Chronicler], Fact], tuple[str, str]] = {
    birth: ("birthplace", "birthyear"),
    move: ("destination", "departure"),
    school: ("school", "subject"),
    wedding: ("spouse", "wedding"),
    prize: ("art", "victory"),
}
"""And the questions that each answers."""


# --- Articles --------------------------------------------------------------------------------------------------------
def write_article(rng: random.Random, title: str, *, world: World, all_answers: bool) -> dict[str, Any]:
    """Three of the facts and, in random order, a question about each of the five."""
    of = Chronicler(rng, world)
    kinds = rng.sample(list(FACTS), len(FACTS))
    facts, context, rows = [], "", []
    for kind in kinds[:TOLD]:
        facts.append((len(context), fact := kind(of)))
        context += fact.sentence + " "
    for begin, fact in facts:
        asked = "school" if len(fact.answers.get("school", ())) > 1 else rng.choice(sorted(fact.answers))
        texts = rng.sample(fact.answers[asked], len(fact.answers[asked]))  # in the annotators' order
        found = [{"text": text, "answer_start": begin + fact.sentence.index(text)} for text in texts]
        group = AMBIGUOUS if len(texts) > 1 else ANSWERABLE
        rows.append(_row(of, title, asked, group, found if all_answers else found[:1]))
    rows += [_row(of, title, rng.choice(FACTS[kind]), UNANSWERABLE, []) for kind in kinds[TOLD:]]
    rng.shuffle(rows)
    if world is UNSEEN:
        rows = [{**row, "group": SHIFTED} for row in rows]
    return {"title": title, "paragraphs": [{"context": context.rstrip(), "qas": rows}]}


def _row(of: Chronicler, title: str, asked: str, group: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    text = of.say(*of.world.questions[asked]).format(name=of.name)
    official = {"id": f"{title}-{asked}", "question": text, "answers": answers, "is_impossible": not answers}
    return {**official, "group": group}


def write_articles(
    seed: int = 0, *, train: int = 200, validation: int = 60, test: int = 160, shifted: int = 60
) -> dict[str, dict[str, Any]]:
    """Each split in SQuAD v2.0's JSON: so many articles of five questions; a function of ``seed`` and the sizes."""
    rng = random.Random(seed)
    sizes = {"train": train, "validation": validation, "test": test, SHIFTED: shifted}
    return {name: _split(rng, name, size) for name, size in sizes.items()}


def _split(rng: random.Random, name: str, size: int) -> dict[str, Any]:
    world, all_answers = UNSEEN if name == SHIFTED else KNOWN, name != "train"
    titles = [f"{name}-{index}" for index in range(size)]
    articles = [write_article(rng, title, world=world, all_answers=all_answers) for title in titles]
    return {"version": "v2.0", "data": articles}
