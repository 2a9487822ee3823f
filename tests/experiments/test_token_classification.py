"""Labelled sentences of files, of the hub and of the generator: which sets they make, and which rows are held out."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from datasets import ClassLabel, Dataset, Features, Sequence, Value

from bayeformers.experiments import ConllArguments, ConllData, History, load_conll_data
from bayeformers.experiments.rows import FRESH
from bayeformers.experiments.token_classification import read_columns
from bayeformers.tasks import Sentence
from examples.data.newswire import generate

from .test_question_answering import UNKNOWN, reloaded


def load(seed: int = 0, history: History = FRESH, **flags: Any) -> ConllData:
    return load_conll_data(ConllArguments(**flags), seed, history, generate=generate)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_files_with_and_without_validation(tmp_path: Path) -> None:
    lines = "\n\n".join(f"Mara{i} B-PER\nsaw O\nOrland B-LOC" for i in range(40)) + "\n"
    train, test = write(tmp_path / "train", lines), write(tmp_path / "test", "Corvex S-ORG\nfell O\n")
    data = load(train_file=train, test_file=test, validation_share=0.25)
    assert {name: len(part) for name, part in data.sets.items()} == {"train": 30, "test": 1, "validation": 10}
    assert not {one.words for one in data.sets["train"]} & {one.words for one in data.sets["validation"]}
    assert data.schemes == {"train": "IOB2", "test": "BIOES"}
    assert data.labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    files = {"train_file": train, "validation_file": train, "test_file": test, "shifted_file": train}
    data = load(**files, max_train_samples=5, max_eval_samples=3)
    assert [len(data.sets[name]) for name in ("train", "validation", "test", "shifted")] == [5, 3, 1, 3]
    assert {one.group for one in data.sets["shifted"]} == {"shifted"} and set(data.reported) == {"test", "shifted"}


@pytest.mark.parametrize("named", [True, False])
def test_hub_columns_of_names_or_numbers(named: bool) -> None:
    names = ["O", "I-PER", "I-LOC"]
    kind = Value("string") if named else ClassLabel(names=names)
    rows = {"tokens": [["Mara", "left"], ["Orland"], []], "ner_tags": [["I-PER", "O"], ["I-LOC"], []]}
    split = Dataset.from_dict(rows, features=Features(tokens=Sequence(Value("string")), ner_tags=Sequence(kind)))
    sentences, scheme = read_columns(split, "tokens", "ner_tags")
    assert scheme == "IOB1"
    assert sentences == [Sentence(("Mara", "left"), ("B-PER", "O")), Sentence(("Orland",), ("B-LOC",))]


def test_hub_columns_that_are_missing_or_no_labels() -> None:
    split = Dataset.from_dict({"tokens": [["Mara"]], "ner_tags": [["NNP"]]})
    with pytest.raises(ValueError, match="`label_column` 'ner_tags' must hold labels such as O and B-PER, got {'NNP'}"):
        read_columns(split, "tokens", "ner_tags")
    with pytest.raises(ValueError, match="no column 'words', only"):
        read_columns(split, "words", "ner_tags")


def test_offline_hub_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(OSError, match=r"no network\nWithout network, give --train_file and --test_file"):
        load(dataset_name="user/name")


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
        ConllArguments(**changes)


def test_data_without_an_entity_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("a O\nb O\n\n" * 20)
    with pytest.raises(ValueError, match="Every label of the data is O: there is no entity to find"):
        load(train_file=str(file), test_file=str(file))


def test_generated_sentences_are_those_of_the_record(tmp_path: Path) -> None:
    first = load(0)
    again = load(1, reloaded(first.rows, tmp_path))
    assert again.sets["validation"] == first.sets["validation"]
    assert again.sets["test"] == first.sets["test"] != load(1).sets["test"]
    with pytest.raises(ValueError, match="has no record"):
        load(1, UNKNOWN)


def test_sentences_of_a_file_are_held_out_as_they_were(tmp_path: Path) -> None:
    lines = "".join(f"The O\nword{i} B-PER\nends O\n\n" for i in range(60))
    for name in ("train", "test"):
        (tmp_path / f"{name}.conll").write_text(lines.replace("word", name))
    files: dict[str, Any] = {name: str(tmp_path / f"{name[:-5]}.conll") for name in ("train_file", "test_file")}
    first = load(0, **files, validation_share=0.25)
    history = reloaded(first.rows, tmp_path)
    again = load(1, history, **files)
    assert again.sets["validation"] == first.sets["validation"] and len(again.sets["validation"]) == 15
    with pytest.raises(ValueError, match="--validation_file"):
        load(1, UNKNOWN, **files)
    with pytest.raises(ValueError, match="45 of the 60 validation rows were trained on"):
        load(1, history, **files, validation_file=files["train_file"])
