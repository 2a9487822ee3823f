"""An acceptability task in GLUE's format, generated from a small grammar whose uncertainties are known.

A sentence is acceptable (label 1) when its words agree in number, over a distance and past nouns of the other number:

    1   the otters near the big dog sleep          0   the otters near the big dog sleeps

Four constructions are *clean*: the grammar decides their label. The fifth, *neither ... nor*, is *noisy*: speakers
disagree about it, so a quarter of its labels are flipped, and the best possible model is right 75 % of the time there,
with an aleatoric entropy of H(1/4) = 0.562 nat. The *shifted* set asks about sentences unlike all training sentences:
known words in constructions never seen, and unseen words in known constructions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
FLIP_RATE = 0.25
Group = Literal["clean", "noisy", "shifted"]


@dataclass(frozen=True)
class Word:
    """A noun, verb, determiner or pronoun in its two numbers."""

    singular: str
    plural: str

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


def _nouns(names: str) -> tuple[Word, ...]:
    return tuple(Word(name, name + "s") for name in names.split())


def _verbs(names: str) -> tuple[Word, ...]:
    return tuple(Word(name + "s", name) for name in names.split())


@dataclass(frozen=True)
class Lexicon:
    """The open word classes. Words early in a list are frequent, later ones rare, as in a language."""

    nouns: tuple[Word, ...]
    intransitives: tuple[Word, ...]
    transitives: tuple[Word, ...]
    adjectives: tuple[str, ...]


KNOWN = Lexicon(
    nouns=_nouns(
        "dog cat bear horse goat otter rabbit duck hen pig lion tiger raven camel badger beaver eagle "
        "falcon robin zebra"
    ),
    intransitives=_verbs("sleep run wait hide jump eat swim rest"),
    transitives=_verbs("see follow like fear help know"),
    adjectives=tuple(
        "big old young grey quiet clever small lazy hungry brave tall happy noisy proud muddy shy lucky dizzy quirky "
        "vain".split()
    ),
)
UNSEEN = Lexicon(
    nouns=_nouns("alpaca bison cobra donkey ferret gazelle hedgehog iguana jackal koala lemur newt ocelot puffin"),
    intransitives=_verbs("yawn limp prowl shiver crawl snore blink climb"),
    transitives=_verbs("admire tickle nudge trust avoid greet"),
    adjectives=tuple("purple gentle wicked dusty royal feeble".split()),
)
PREPOSITIONS = ("near", "behind", "under", "beside")
DEMONSTRATIVE = Word("this", "these")
REFLEXIVE = Word("itself", "themselves")


class Speaker:
    """Draws words from a lexicon; every construction below asks it for its parts."""

    def __init__(self, rng: random.Random, lexicon: Lexicon = KNOWN) -> None:
        self.rng = rng
        self.lexicon = lexicon

    def pick(self, words: tuple[T, ...]) -> T:
        """A word with probability proportional to 1 / rank (Zipf's law)."""
        return self.rng.choices(words, weights=[1 / rank for rank in range(1, len(words) + 1)])[0]

    def plural(self) -> bool:
        return self.rng.random() < 0.5

    def noun(self, plural: bool) -> str:
        adjective = f"{self.pick(self.lexicon.adjectives)} " if self.rng.random() < 0.2 else ""
        return adjective + self.pick(self.lexicon.nouns).form(plural)

    def the(self, plural: bool) -> str:
        return f"the {self.noun(plural)}"

    def beside(self, plural: bool) -> str:
        return f"{self.rng.choice(PREPOSITIONS)} {self.the(plural)}"

    def sleeps(self, plural: bool) -> str:
        return self.pick(self.lexicon.intransitives).form(plural)

    def sees(self, plural: bool) -> str:
        return self.pick(self.lexicon.transitives).form(plural)


# --- Constructions: a sentence with number agreement throughout, or (`wrong`) broken in one place --------------------
Construction = Callable[[Speaker, bool], str]


def distance(say: Speaker, wrong: bool) -> str:
    """The otters near the dog (under the ducks) sleep."""
    number, attractors = say.plural(), [say.plural() for _ in range(say.rng.choice((1, 1, 1, 2)))]
    path = " ".join(say.beside(attractor) for attractor in attractors)
    return f"{say.the(number)} {path} {say.sleeps(number ^ wrong)}"


def relative(say: Speaker, wrong: bool) -> str:
    """The otter that the dogs fear sleeps: the nearest noun is not the subject."""
    outer, inner = say.plural(), say.plural()
    return f"{say.the(outer)} that {say.the(inner)} {say.sees(inner)} {say.sleeps(outer ^ wrong)}"


def reflexive(say: Speaker, wrong: bool) -> str:
    """The otters near the dog help themselves: the pronoun looks back past a noun and a verb."""
    number, attractor = say.plural(), say.plural()
    return f"{say.the(number)} {say.beside(attractor)} {say.sees(number)} {REFLEXIVE.form(number ^ wrong)}"


def demonstrative(say: Speaker, wrong: bool) -> str:
    """The dog sees these (old) otters."""
    subject, number = say.plural(), say.plural()
    return f"{say.the(subject)} {say.sees(subject)} {DEMONSTRATIVE.form(number ^ wrong)} {say.noun(number)}"


def neither(say: Speaker, wrong: bool) -> str:
    """Neither the dog nor the otters sleep: the verb agrees with the nearer noun, if one asks a grammar book."""
    far, near = say.plural(), say.plural()
    return f"neither {say.the(far)} nor {say.the(near)} {say.sleeps(near ^ wrong)}"


def inversion(say: Speaker, wrong: bool) -> str:
    """Near the dog sleep the otters."""
    number, attractor = say.plural(), say.plural()
    return f"{say.beside(attractor)} {say.sleeps(number ^ wrong)} {say.the(number)}"


def cleft(say: Speaker, wrong: bool) -> str:
    """Themselves the otters near the dog help."""
    number, attractor = say.plural(), say.plural()
    return f"{REFLEXIVE.form(number)} {say.the(number)} {say.beside(attractor)} {say.sees(number ^ wrong)}"


def nested(say: Speaker, wrong: bool) -> str:
    """The otter that the dogs that the duck fears help sleeps."""
    outer, middle, inner = say.plural(), say.plural(), say.plural()
    innermost = f"that {say.the(inner)} {say.sees(inner)}"
    return f"{say.the(outer)} that {say.the(middle)} {innermost} {say.sees(middle)} {say.sleeps(outer ^ wrong)}"


CLEAN: tuple[Construction, ...] = (distance, relative, reflexive, demonstrative)
NOISY: tuple[Construction, ...] = (neither,)
UNSEEN_CONSTRUCTIONS: tuple[Construction, ...] = (inversion, cleft, nested)


# --- The task --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Example:
    """A row. `label` is what the annotator wrote, `grammatical` what the grammar says: they differ on flipped rows."""

    sentence: str
    label: int
    grammatical: int
    group: Group
    construction: str


class Annotator:
    """Writes new examples, never the same sentence twice."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.written: set[str] = set()

    def example(self, construction: Construction, group: Group, lexicon: Lexicon = KNOWN) -> Example:
        speaker = Speaker(self.rng, lexicon)
        wrong = self.rng.random() < 0.5
        while (sentence := construction(speaker, wrong)) in self.written:
            pass
        self.written.add(sentence)
        flipped = group == "noisy" and self.rng.random() < FLIP_RATE
        kind = construction.__name__ + ("" if lexicon is KNOWN else ", unseen words")
        return Example(sentence, int(not wrong) ^ flipped, int(not wrong), group, kind)

    def in_distribution(self, size: int) -> list[Example]:
        """`size` examples, equally many of each construction (so a fifth is noisy), shuffled."""
        constructions = [(c, "clean") for c in CLEAN] + [(c, "noisy") for c in NOISY]
        rows = [self.example(*constructions[i % len(constructions)]) for i in range(size)]
        self.rng.shuffle(rows)
        return rows

    def shifted(self, size: int) -> list[Example]:
        """Half known words in unseen constructions, half unseen words in the clean constructions."""
        rows = []
        for i in range(size // 2):
            rows.append(self.example(UNSEEN_CONSTRUCTIONS[i % len(UNSEEN_CONSTRUCTIONS)], "shifted"))
        for i in range(size - size // 2):
            rows.append(self.example(CLEAN[i % len(CLEAN)], "shifted", UNSEEN))
        return rows


def generate(
    seed: int = 0, *, train: int = 2000, validation: int = 400, test: int = 1500, shifted: int = 500
) -> dict[str, list[Example]]:
    """The splits ``train``, ``validation``, ``test`` and ``shifted``, a function of `seed` and the sizes alone."""
    annotator = Annotator(random.Random(seed))
    splits = {
        name: annotator.in_distribution(size)
        for name, size in (("train", train), ("validation", validation), ("test", test))
    }
    return {**splits, "shifted": annotator.shifted(shifted)}
