"""The generated newswire: sizes, labels and the uncertainties that are known of it."""

import math
import random

import pytest

from bayeformers.tasks import Sentence, find_entities
from bayeformers.tasks.conll import to_iob2
from examples.data.newswire import (
    AMBIGUOUS_TEMPLATES,
    CLEAN_TEMPLATES,
    KNOWN,
    PERSON_SHARE,
    UNSEEN,
    UNSEEN_TEMPLATES,
    Names,
    Reporter,
    generate,
)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Sentence]]:
    return generate(0)


def test_sizes_and_seed(splits: dict[str, list[Sentence]]) -> None:
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 1200, "validation": 300, "test": 800, "shifted": 300,
    }  # fmt: skip
    assert generate(0) == splits != generate(1)


def test_labels_are_consistent_iob2(splits: dict[str, list[Sentence]]) -> None:
    for part in splits.values():
        for one in part:
            assert list(one.labels) == to_iob2(one.labels) and len(one.words) == len(one.labels)
            assert find_entities(one.labels), "every sentence has an entity"


def test_ambiguous_names_are_persons_with_the_known_probability() -> None:
    part = generate(1, train=6000, validation=1, test=1, shifted=1)["train"]
    drawn = [one for one in part if one.ambiguous]
    assert {one.group for one in drawn} == {"ambiguous"} and {one.group for one in part} == {"ambiguous", "clean"}
    is_person = [one.labels[one.ambiguous[0]] == "B-PER" for one in drawn]
    error = math.sqrt(PERSON_SHARE * (1 - PERSON_SHARE) / len(drawn))
    assert abs(sum(is_person) / len(drawn) - PERSON_SHARE) < 4 * error
    for one in drawn:  # both words of a name are of the one type that was drawn
        assert len({one.labels[place][2:] for place in one.ambiguous}) == 1 <= len(one.ambiguous) <= 2
        assert {one.labels[place][2:] for place in one.ambiguous} <= {"PER", "LOC"}
    with_two = sum(len(one.ambiguous) == 2 for one in drawn) / len(drawn)
    assert abs(with_two - 1 / 3) < 4 * math.sqrt(2 / 9 / len(drawn))


def words_of(names: Names) -> set[str]:
    return {*names.first, *names.last, *names.places, *names.companies}


def test_shifted_names_are_unseen_and_half_of_the_contexts(splits: dict[str, list[Sentence]]) -> None:
    known = {word for one in splits["train"] for word in one.words}
    assert not words_of(UNSEEN) & known and not words_of(UNSEEN) & words_of(KNOWN)
    for one in splits["shifted"]:
        assert words_of(UNSEEN) & set(one.words) and not words_of(KNOWN) & set(one.words)
    only = [{word for word in template.split() if "{" not in word} for template in UNSEEN_TEMPLATES]
    unseen = [one for one in splits["shifted"] if any(words <= set(one.words) for words in only)]
    assert len(unseen) == 150
    assert not set(UNSEEN_TEMPLATES) & {*CLEAN_TEMPLATES, *AMBIGUOUS_TEMPLATES}


@pytest.mark.parametrize("template", [*CLEAN_TEMPLATES, *AMBIGUOUS_TEMPLATES, *UNSEEN_TEMPLATES])
def test_templates_are_filled(template: str) -> None:
    for seed in range(20):
        sentence = Reporter(random.Random(seed)).sentence(template, "clean")
        assert not any("{" in word for word in sentence.words)
        assert len(find_entities(sentence.labels)) == sum(
            slot.startswith("{") and slot != "{day}" for slot in template.split()
        )
