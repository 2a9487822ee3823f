"""CoNLL files, tagging schemes and entities, exactly."""

import itertools
from pathlib import Path

import pytest

from bayeformers.tasks.conll import (
    Entity,
    Sentence,
    detect_scheme,
    find_entities,
    label_names,
    read_conll,
    to_iob2,
    write_conll,
)


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
    lines = (
        ("Mara Halden left .", "B-PER I-PER O O"),
        ("Orland", "B-LOC"),
        ("Bo met Corvex Bank", "B-PER O B-ORG I-ORG"),
    )
    sentences = [Sentence(tuple(words.split()), tuple(labels.split())) for words, labels in lines]
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
