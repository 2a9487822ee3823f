"""The embedded task is what its description says: sizes, noise, shift, spelling, no leaks, a function of its seed."""

import math

import pytest

from examples.data.grammar import (
    CLEAN,
    FLIP_RATE,
    KNOWN,
    NOISY,
    UNSEEN,
    UNSEEN_CONSTRUCTIONS,
    Annotator,
    Construction,
    Example,
    Lexicon,
    Speaker,
    generate,
)
from examples.data.tiny_bert import MAX_LENGTH, make_model, make_tokenizer

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def task() -> dict[str, list[Example]]:
    return generate(0)


def words(lexicon: Lexicon) -> set[str]:
    inflected = (*lexicon.nouns, *lexicon.intransitives, *lexicon.transitives)
    return {form for word in inflected for form in (word.singular, word.plural)} | set(lexicon.adjectives)


def sentences(rows: list[Example]) -> set[str]:
    return {row.sentence for row in rows}


def test_sizes_and_shares(task: dict[str, list[Example]]) -> None:
    assert {name: len(rows) for name, rows in task.items()} == {
        "train": 2000, "validation": 400, "test": 1500, "shifted": 500,
    }  # fmt: skip
    for name in ("train", "validation", "test"):
        groups = [row.group for row in task[name]]
        assert groups.count("noisy") == len(groups) // 5
        assert groups.count("clean") == len(groups) - len(groups) // 5
    assert {row.group for row in task["shifted"]} == {"shifted"}


def test_no_sentence_occurs_twice(task: dict[str, list[Example]]) -> None:
    assert len(set().union(*map(sentences, task.values()))) == sum(map(len, task.values()))


def test_it_is_a_function_of_its_seed(task: dict[str, list[Example]]) -> None:
    assert generate(0) == task
    assert generate(1) != task


def test_labels_are_balanced(task: dict[str, list[Example]]) -> None:
    rows = [row for split in task.values() for row in split]
    # 4 standard errors of a fair coin
    assert abs(sum(row.label for row in rows) / len(rows) - 0.5) < 4 * 0.5 / math.sqrt(len(rows))


def test_a_quarter_of_noisy_labels_and_no_other_is_flipped(task: dict[str, list[Example]]) -> None:
    rows = [row for split in task.values() for row in split]
    noisy = [row.label != row.grammatical for row in rows if row.group == "noisy"]
    error = math.sqrt(FLIP_RATE * (1 - FLIP_RATE) / len(noisy))
    assert abs(sum(noisy) / len(noisy) - FLIP_RATE) < 4 * error
    assert all(row.label == row.grammatical for row in rows if row.group != "noisy")


def test_shifted_is_new_constructions_or_new_words(task: dict[str, list[Example]]) -> None:
    known = set(" ".join(sentences(task["train"])).split())
    unseen = [row for row in task["shifted"] if set(row.sentence.split()) - known]
    assert len(unseen) == 250
    assert all(set(row.sentence.split()) - known <= words(UNSEEN) for row in unseen)
    trained = {row.construction for row in task["train"]}
    others = [row for row in task["shifted"] if row not in unseen]
    assert {row.construction for row in others} == {construction.__name__ for construction in UNSEEN_CONSTRUCTIONS}
    assert not {row.construction for row in others} & trained
    assert not words(KNOWN) & words(UNSEEN)


@pytest.mark.parametrize("construction", [*CLEAN, *NOISY, *UNSEEN_CONSTRUCTIONS])
def test_wrong_differs_from_right_in_one_word(construction: Construction) -> None:
    import random

    for seed in range(50):
        right, wrong = (construction(Speaker(random.Random(seed)), fault).split() for fault in (False, True))
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 1


def test_small_tasks_can_be_made() -> None:
    small = generate(3, train=10, validation=5, test=5, shifted=3)
    assert [len(rows) for rows in small.values()] == [10, 5, 5, 3]
    assert Annotator.__doc__


# --- Tokenizer and model ---------------------------------------------------------------------------------------------
def test_every_sentence_is_spelled(task: dict[str, list[Example]]) -> None:
    tokenizer = make_tokenizer(row.sentence for row in task["train"])
    for rows in task.values():
        for row in rows:
            ids = tokenizer(row.sentence)["input_ids"]
            assert tokenizer.unk_token_id not in ids and len(ids) <= MAX_LENGTH
            assert tokenizer.decode(ids, skip_special_tokens=True) == row.sentence
    assert tokenizer.tokenize("the newts") == ["the", "n", "##e", "##w", "##t", "##s"]


def test_tokenizer_survives_saving(task: dict[str, list[Example]], tmp_path: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(row.sentence for row in task["train"])
    tokenizer.save_pretrained(str(tmp_path))
    sentence = task["shifted"][-1].sentence
    assert AutoTokenizer.from_pretrained(str(tmp_path))(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]


def test_model_has_a_head_for_the_task() -> None:
    assert make_model(50, num_labels=3).classifier.out_features == 3
