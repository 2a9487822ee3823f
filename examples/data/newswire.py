"""A named-entity set in CoNLL's format, generated from templates and invented names, whose uncertainties are known.

    Mara Halden   joined   Halden Bank   in   Port Selby     .
    B-PER I-PER   O        B-ORG I-ORG   O    B-LOC I-LOC    O

Surnames also name companies and towns, so that a word's type depends on its context. *Clean* sentences leave no doubt.
*Ambiguous* ones do: "Jordan was in the news again ." is a person with probability 0.7 and a place else, drawn anew for
each sentence, so the best possible model says 70 % there: an aleatoric entropy of 0.611 nat. A third of these names has
two words, both of the one type that was drawn. The *shifted* set has unseen names, half of it in unseen contexts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from bayeformers.tasks import Sentence

PERSON_SHARE = 0.7
AMBIGUOUS_SHARE = 0.3
"""Of the sentences of the training, validation and test sets."""
Group = Literal["clean", "ambiguous", "shifted"]


@dataclass(frozen=True)
class Names:
    """The parts that names are made of. Early ones are frequent, later ones rare, as in a language."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    places: tuple[str, ...]
    companies: tuple[str, ...]


KNOWN = Names(
    first=tuple(
        "Mara Tomas Elin Ravi Nadia Oskar Lena Pavel Ines Hugo Wanda Emil Petra Kofi Sanna Dario Yuki Anton Freya "
        "Malik Greta Bruno Tilda Omar".split()
    ),
    last=tuple(
        "Halden Brandt Selby Corwin Varga Lindt Osman Petrov Harlow Quist Moreau Tanner Falk Renner Abara Kessler "
        "Doyle Marek Voss Ferrer Ishida Nolan Stroud Becker".split()
    ),
    places=tuple(
        "Orland Tavira Kelmar Dunmore Vesta Lorien Brennia Calden Marisko Pelham Sarno Gravik Ostend Milbury Tarsk "
        "Wexley Argento Holm Nivala Redding".split()
    ),
    companies=tuple(
        "Corvex Nordal Zentra Ubiq Palladin Ferrox Mirador Solvena Atrium Kestrel Dynamo Veltis Oxbow Lumen Tesson "
        "Arkada".split()
    ),
)
UNSEEN = Names(
    first=tuple("Juno Casper Zadie Leopold Amira Fergus Noor Silas".split()),
    last=tuple("Pryce Okafor Wexler Dragan Thorne Hyland Castell Umarov Zielin Bexley".split()),
    places=tuple("Quillan Drossen Fairmoor Ulveck Jastrow Penvale Yarrick Zembra".split()),
    companies=tuple("Xylos Quantrell Hexagon Jovian Brightline Whitlock Fyodar Krypta".split()),
)
AMBIGUOUS = ("Jordan", "Sydney", "Austin", "Florence", "Chester", "Devon")
SECOND = ("Hill", "Grove", "Rivers")
"""With one of these an ambiguous name has two words."""
DAYS = tuple("monday tuesday wednesday thursday friday saturday sunday".split())
TOWN_PREFIXES = ("Port", "New", "Saint")
COMPANY_SUFFIXES = ("Bank", "Motors", "Airlines", "Group")

CLEAN_TEMPLATES = (
    "{per} met {per} in {loc} on {day} .",
    "{per} joined {org} in {loc} .",
    "{org} opened an office in {loc} on {day} .",
    "shares of {org} fell after {per} resigned .",
    "{per} said on {day} that {org} would leave {loc} .",
    "the mayor of {loc} welcomed {per} .",
    "{org} bought {org} for an undisclosed sum .",
    "police in {loc} questioned {per} on {day} .",
    "the train from {loc} to {loc} was late on {day} .",
    "profits at {org} rose sharply .",
    "{amb_per} told reporters that {org} had apologised .",
    "heavy rain hit {amb_loc} on {day} .",
)
AMBIGUOUS_TEMPLATES = (
    "{amb} was in the news again .",
    "everybody at {org} talks about {amb} .",
    "{amb} had a difficult year .",
)
UNSEEN_TEMPLATES = (
    "lawyers for {org} and for {per} declined to comment .",
    "born in {loc} she later led {org} .",
    "flights between {loc} and {loc} were cancelled .",
    "the prize went to {per} of {org} .",
)


class Reporter:
    """Writes sentences: fills templates with names."""

    def __init__(self, rng: random.Random, names: Names = KNOWN) -> None:
        self.rng = rng
        self.names = names

    def pick(self, names: tuple[str, ...]) -> str:
        """A name with probability proportional to 1 / rank (Zipf's law)."""
        return self.rng.choices(names, weights=[1 / rank for rank in range(1, len(names) + 1)])[0]

    def person(self) -> list[str]:
        """A first name, a surname, or both."""
        first, last = self.pick(self.names.first), self.pick(self.names.last)
        return self.rng.choices(([first, last], [last], [first]), weights=(6, 3, 1))[0]

    def place(self) -> list[str]:
        """A town; one in four is "Port", "New" or "Saint" something, which may be a surname."""
        if self.rng.random() < 0.25:
            return [self.rng.choice(TOWN_PREFIXES), self.pick(self.names.places + self.names.last)]
        return [self.pick(self.names.places)]

    def company(self) -> list[str]:
        """A made-up word, or a surname with a suffix."""
        if self.rng.random() < 0.5:
            return [self.pick(self.names.last), self.rng.choice(COMPANY_SUFFIXES)]
        return [self.pick(self.names.companies)]

    def ambiguous(self, may_have_two: bool = True) -> list[str]:
        """A name that people and places share."""
        second = [self.rng.choice(SECOND)] if may_have_two and self.rng.random() < 1 / 3 else []
        return [self.pick(AMBIGUOUS), *second]

    def sentence(self, template: str, group: Group) -> Sentence:
        """The template filled, with IOB2 labels."""
        words: list[str] = []
        labels: list[str] = []
        doubtful: list[int] = []
        for slot in template.split():
            filled, kind = self._fill(slot)
            if slot == "{amb}":
                doubtful += range(len(words), len(words) + len(filled))
            words += filled
            labels += [f"B-{kind}", *[f"I-{kind}"] * (len(filled) - 1)] if kind else ["O"] * len(filled)
        return Sentence(tuple(words), tuple(labels), group, tuple(doubtful))

    def _fill(self, slot: str) -> tuple[list[str], str]:
        """Words, and their type or an empty string."""
        if slot == "{amb}":
            return self.ambiguous(), "PER" if self.rng.random() < PERSON_SHARE else "LOC"
        filled = {
            "{per}": (self.person, "PER"), "{loc}": (self.place, "LOC"), "{org}": (self.company, "ORG"),
            "{amb_per}": (self.ambiguous, "PER"), "{amb_loc}": (self.ambiguous, "LOC"),
        }  # fmt: skip
        if slot in filled:
            make, kind = filled[slot]
            return make(), kind
        return [self.rng.choice(DAYS) if slot == "{day}" else slot], ""


def generate(
    seed: int = 0, *, train: int = 1200, validation: int = 300, test: int = 800, shifted: int = 300
) -> dict[str, list[Sentence]]:
    """The splits ``train``, ``validation``, ``test`` and ``shifted``, a function of `seed` and the sizes alone."""
    rng = random.Random(seed)
    known, unseen = Reporter(rng), Reporter(rng, UNSEEN)
    splits = {
        name: [_known(known) for _ in range(size)]
        for name, size in (("train", train), ("validation", validation), ("test", test))
    }
    plain = tuple(template for template in CLEAN_TEMPLATES if "amb" not in template)
    contexts = [UNSEEN_TEMPLATES if index % 2 else plain for index in range(shifted)]
    splits["shifted"] = [unseen.sentence(rng.choice(templates), "shifted") for templates in contexts]
    return splits


def _known(reporter: Reporter) -> Sentence:
    if reporter.rng.random() < AMBIGUOUS_SHARE:
        return reporter.sentence(reporter.rng.choice(AMBIGUOUS_TEMPLATES), "ambiguous")
    return reporter.sentence(reporter.rng.choice(CLEAN_TEMPLATES), "clean")
