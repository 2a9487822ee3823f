"""CoNLL files, tagging schemes, entity scores, the generated set and the alignment of labels with pieces, exactly."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from datasets import ClassLabel, Dataset, Features, Sequence, Value

from examples.conll.arguments import TokenDataArguments, parse_arguments
from examples.conll.data import IGNORED, encode, from_dataset, load_data
from examples.conll.entities import Entity, detect_scheme, entity_scores, find_entities, label_names, to_iob2
from examples.conll.newswire import (
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
from examples.conll.reader import Sentence, read_conll, write_conll
from examples.glue.tiny_bert import make_tokenizer


# --- Entities --------------------------------------------------------------------------------------------------------
def conlleval(labels: tuple[str, ...]) -> set[Entity]:
    """The spans of `conlleval`, by its own two questions between neighbours (Tjong Kim Sang, 2000)."""

    def begins(before: str, now: str) -> bool:
        (tag_before, _, kind_before), (tag, _, kind) = before.partition("-"), now.partition("-")
        return tag == "B" or (tag == "I" and (tag_before == "O" or kind_before != kind))

    def ends(before: str, now: str) -> bool:
        (tag_before, _, kind_before), (tag, _, kind) = before.partition("-"), now.partition("-")
        return tag_before in ("B", "I") and (tag in ("B", "O") or kind_before != kind)

    found, start = set(), -1
    for position, (before, now) in enumerate(itertools.pairwise(("O", *labels, "O"))):
        if ends(before, now):
            found.add(Entity(start, position, before[2:]))
        if begins(before, now):
            start = position
    return found


def test_spans_are_those_of_conlleval_on_every_short_sequence() -> None:
    alphabet = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    for length in range(6):
        for labels in itertools.product(alphabet, repeat=length):
            assert set(find_entities(labels)) == conlleval(labels), labels


def all_segmentations(length: int) -> list[list[Entity]]:
    """Every set of non-overlapping entities of two types in a sentence."""
    if length <= 0:
        return [[]]
    found = [list(rest) for rest in all_segmentations(length - 1)]
    for size, kind in itertools.product(range(1, length + 1), ("PER", "LOC")):
        found += [[*rest, Entity(length - size, length, kind)] for rest in all_segmentations(length - size)]
    return found


def tagged(entities: list[Entity], length: int, scheme: str) -> list[str]:
    """Labels of entities, written from the definition of each scheme."""
    labels = ["O"] * length
    for start, end, kind in entities:
        follows = any(other.end == start and other.type == kind for other in entities)
        for place in range(start, end):
            first, last = place == start, place == end - 1
            if scheme == "IOB2":
                prefix = "B" if first else "I"
            elif scheme == "IOB1":
                prefix = "B" if first and follows else "I"
            else:
                whole, closing = ("S", "E") if scheme == "BIOES" else ("U", "L")
                prefix = whole if first and last else "B" if first else closing if last else "I"
            labels[place] = f"{prefix}-{kind}"
    return labels


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "BIOES", "BILOU"])
def test_every_scheme_becomes_iob2(scheme: str) -> None:
    for entities in all_segmentations(4):
        labels = tagged(entities, 4, scheme)
        assert to_iob2(labels) == tagged(entities, 4, "IOB2"), labels
        assert find_entities(to_iob2(labels)) == sorted(entities)


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "BIOES", "BILOU"])
def test_schemes_are_told_apart(scheme: str) -> None:
    assert detect_scheme([tagged(entities, 4, scheme) for entities in all_segmentations(4)]) == scheme


def test_schemes_without_evidence_or_with_both() -> None:
    assert detect_scheme([["O", "O"], []]) == "IOB2"
    assert detect_scheme([["O", "B-PER"], ["I-LOC", "O"]]) == "IOB1 and IOB2 mixed"
    assert detect_scheme([["I-PER", "B-PER"]]) == "IOB1"


@pytest.mark.parametrize(
    ("labels", "pair"),
    [
        (["S-PER", "I-PER"], "S-PER I-PER"),
        (["B-PER", "O", "S-PER"], "B-PER O"),
        (["B-PER", "E-LOC"], "B-PER E-LOC"),
        (["S-PER", "B-LOC"], "B-LOC O"),
        (["E-PER"], "O E-PER"),
    ],
)
def test_contradictions_in_bioes_are_named(labels: list[str], pair: str) -> None:
    with pytest.raises(ValueError, match=f"sentence 2 is not BIOES: it has '{pair}'"):
        detect_scheme([["O"], labels])


def test_label_names_have_both_prefixes_of_each_type() -> None:
    assert label_names([["O"], ["I-ORG", "B-LOC"]]) == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG"]


@pytest.mark.parametrize(
    ("gold", "predicted", "scores"),
    [
        ("B-PER I-PER O", "B-PER I-PER O", (1, 1, 1)),
        ("B-PER I-PER O", "B-PER O O", (0, 0, 0)),  # part of a span is no match
        ("B-PER I-PER O", "B-LOC I-LOC O", (0, 0, 0)),  # nor is the span of another type
        ("B-PER I-PER O", "I-PER I-PER O", (1, 1, 1)),  # an I begins a span where nothing goes on
        ("B-PER B-PER O", "B-PER I-PER O", (0, 0, 0)),  # two entities taken for one
        ("B-PER O B-LOC", "B-PER O O", (1, 1 / 2, 2 / 3)),
        ("B-PER O O", "B-PER O B-LOC", (1 / 2, 1, 2 / 3)),
        ("O O O", "O O O", (0, 0, 0)),  # nothing to find, nothing found: as conlleval prints it
        ("O O O", "B-PER O O", (0, 0, 0)),
        ("B-PER I-LOC O", "B-PER I-LOC O", (1, 1, 1)),  # a change of type ends a span
    ],
)
def test_entity_scores(gold: str, predicted: str, scores: tuple[float, float, float]) -> None:
    found = entity_scores([gold.split()], [predicted.split()])
    assert tuple(found.values()) == pytest.approx(scores)


def test_entity_scores_count_over_all_sentences() -> None:
    """Micro: 2 right of 3 found and 4 sought, though the sentences' own ratios differ."""
    gold = ["B-PER O B-LOC", "B-ORG I-ORG O B-PER"]
    predicted = ["B-PER O B-ORG", "B-ORG I-ORG O O"]
    found = entity_scores([one.split() for one in gold], [one.split() for one in predicted])
    assert found == pytest.approx({"precision": 2 / 3, "recall": 1 / 2, "f1": 4 / 7})
    with pytest.raises(ValueError, match="same lengths"):
        entity_scores([["O"]], [["O", "O"]])


def test_entity_scores_of_random_sequences_are_those_of_conlleval() -> None:
    rng, alphabet = random.Random(0), ("O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    draw = [[tuple(rng.choices(alphabet, k=8)) for _ in range(200)] for _ in range(2)]
    gold, predicted = [[conlleval(one) for one in side] for side in draw]
    correct = sum(len(a & b) for a, b in zip(gold, predicted, strict=True))
    found = entity_scores(*draw)
    assert found["precision"] == correct / sum(map(len, predicted))
    assert found["recall"] == correct / sum(map(len, gold))
    harmonic = 2 / (1 / found["precision"] + 1 / found["recall"])
    assert found["f1"] == pytest.approx(harmonic)


# --- Files -----------------------------------------------------------------------------------------------------------
CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German\tJJ\tI-NP\tI-MISC

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
-DOCSTART- -X- O O
Mara NNP I-NP B-PER
"""


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_the_shared_task(tmp_path: Path) -> None:
    sentences, scheme = read_conll(write(tmp_path / "eng.train", CONLL.replace("B-PER", "I-PER")))
    assert scheme == "IOB1"
    assert sentences == [
        Sentence(("EU", "rejects", "German"), ("B-ORG", "O", "B-MISC")),
        Sentence(("Peter", "Blackburn"), ("B-PER", "I-PER")),
        Sentence(("Mara",), ("B-PER",)),
    ]


@pytest.mark.parametrize(
    "change", [("\n", "\r\n"), ("-DOCSTART-", "\ufeff-DOCSTART-"), ("\n\n", "\n \n\n\n"), (" ", "  ")]
)
def test_line_ends_marks_and_blanks_do_not_matter(change: tuple[str, str], tmp_path: Path) -> None:
    plain, _ = read_conll(write(tmp_path / "plain", CONLL))
    text = CONLL.replace(*change, 1) if change[0] == "-DOCSTART-" else CONLL.replace(*change)
    (tmp_path / "changed").write_bytes(text.encode("utf-8"))
    assert read_conll(str(tmp_path / "changed"))[0] == plain


def test_other_spaces_belong_to_words(tmp_path: Path) -> None:
    (only,), _ = read_conll(write(tmp_path / "file", "10\u00a0000 I-MISC\n-DOCSTART-(2 a) O\n"))
    assert only == Sentence(("10\u00a0000",), ("B-MISC",))


def test_written_files_are_read_again(tmp_path: Path) -> None:
    sentences = generate(0, train=20, validation=1, test=1, shifted=1)["train"]
    write_conll(tmp_path / "train.conll", sentences)
    again, scheme = read_conll(str(tmp_path / "train.conll"))
    assert scheme == "IOB2"
    assert [(one.words, one.labels) for one in again] == [(one.words, one.labels) for one in sentences]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        read_conll(str(tmp_path / "none.txt"))
    for text, message in [
        ("", "has no sentence"),
        ("-DOCSTART- O\n\n", "has no sentence"),
        ("EU B-ORG\nrejects\n", "line 2: a word and its label are needed, got 'rejects' alone"),
        ("EU B-ORG\nrejects VBZ\n", "line 2: the last column must be a label, .* got 'VBZ'"),
        ("EU B-\n", "line 1: the last column must be a label"),
        ("EU S-ORG\nGerman E-MISC\n", "sentence 1 is not BIOES: it has 'S-ORG E-MISC'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_conll(write(tmp_path / "bad.txt", text))


# --- The generated set -----------------------------------------------------------------------------------------------
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


# --- Pieces ----------------------------------------------------------------------------------------------------------
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_labels_stand_at_first_pieces() -> None:
    sentences = [Sentence(("Zoe", "saw", "Rio", "Bo"), ("B-PER", "O", "B-LOC", "I-LOC"))]
    tokenizer = make_tokenizer(["saw " * 20])
    found = encode(sentences, tokenizer, LABELS, max_length=32)
    row = found.dataset[0]
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "z", "##o", "##e", "saw", "r", "##i", "##o", "b", "##o", "[SEP]"]
    expected = [IGNORED] * len(pieces)
    for position, label in ((1, "B-PER"), (4, "O"), (5, "B-LOC"), (8, "I-LOC")):
        expected[position] = LABELS.index(label)
    assert row["labels"] == expected and found.first_pieces == [[1, 4, 5, 8]]


def test_words_that_are_cut_off_or_have_no_piece_are_known() -> None:
    sentences = [Sentence(("saw", "\u200b", "Rio", "Bo"), ("O", "O", "B-LOC", "I-LOC"))]
    found = encode(sentences, make_tokenizer(["saw " * 20]), LABELS, max_length=6)  # [CLS] saw r ##i ##o [SEP]
    assert found.first_pieces == [[1, -1, 2, -1]]
    assert [label for label in found.dataset[0]["labels"] if label != IGNORED] == [0, 1]


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="must have a fast tokenizer"):
        encode([], Slow(), LABELS, 8)  # type: ignore[arg-type]


# --- Data sets by flags ----------------------------------------------------------------------------------------------
def test_files_with_and_without_validation(tmp_path: Path) -> None:
    lines = "\n\n".join(f"Mara{i} B-PER\nsaw O\nOrland B-LOC" for i in range(40)) + "\n"
    train, test = write(tmp_path / "train", lines), write(tmp_path / "test", "Corvex S-ORG\nfell O\n")
    data = load_data(TokenDataArguments(train_file=train, test_file=test, validation_share=0.25), seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 1)
    assert not {one.words for one in data.train} & {one.words for one in data.validation}
    assert data.schemes == {"train": "IOB2", "test": "BIOES"}
    assert data.labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    few = TokenDataArguments(
        train_file=train,
        validation_file=train,
        test_file=test,
        shifted_file=train,
        max_train_samples=5,
        max_eval_samples=3,
    )
    data = load_data(few, seed=0)
    assert [len(part) for part in (data.train, data.validation, data.test, data.shifted)] == [5, 3, 1, 3]
    assert {one.group for one in data.shifted} == {"shifted"} and set(data.reported) == {"test", "shifted"}


@pytest.mark.parametrize("named", [True, False])
def test_hub_columns_of_names_or_numbers(named: bool) -> None:
    names = ["O", "I-PER", "I-LOC"]
    kind = Value("string") if named else ClassLabel(names=names)
    rows = {"tokens": [["Mara", "left"], ["Orland"], []], "ner_tags": [["I-PER", "O"], ["I-LOC"], []]}
    split = Dataset.from_dict(rows, features=Features(tokens=Sequence(Value("string")), ner_tags=Sequence(kind)))
    sentences, scheme = from_dataset(split, TokenDataArguments())
    assert scheme == "IOB1"
    assert sentences == [Sentence(("Mara", "left"), ("B-PER", "O")), Sentence(("Orland",), ("B-LOC",))]


def test_hub_columns_that_are_missing_or_no_labels() -> None:
    split = Dataset.from_dict({"tokens": [["Mara"]], "ner_tags": [["NNP"]]})
    with pytest.raises(ValueError, match="`label_column` 'ner_tags' must hold labels such as O and B-PER, got {'NNP'}"):
        from_dataset(split, TokenDataArguments())
    with pytest.raises(ValueError, match="no column 'words', only"):
        from_dataset(split, TokenDataArguments(text_column="words"))


def test_offline_hub_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("examples.conll.data.load_dataset", offline)
    with pytest.raises(OSError, match=r"no network\nWithout network, give --train_file and --test_file"):
        load_data(TokenDataArguments(dataset_name="user/name"), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "a"}, "`train_file` and `test_file` go together"),
        ({"test_file": "a"}, "`train_file` and `test_file` go together"),
        ({"dataset_name": "a", "train_file": "b", "test_file": "c"}, "exclude each other"),
        ({"validation_share": 0.0}, "`validation_share` must lie between 0 and 1"),
        ({"max_eval_samples": 1}, "`max_eval_samples` must be at least 2, got 1"),
    ],
)
def test_wrong_data_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenDataArguments(**changes)


def test_own_data_need_a_model() -> None:
    with pytest.raises(ValueError, match="`model_name_or_path` is needed for data of your own"):
        parse_arguments(["--train_file", "a", "--test_file", "b"])
    embedded, own = parse_arguments([]), parse_arguments(["--dataset_name", "a", "--model_name_or_path", "b"])
    assert (embedded[2].learning_rate, own[2].learning_rate) == (1e-3, 5e-5)


def test_data_without_an_entity_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("a O\nb O\n\n" * 20)
    with pytest.raises(ValueError, match="Every label of the data is O: there is no entity to find"):
        load_data(TokenDataArguments(train_file=str(file), test_file=str(file)), 0)
