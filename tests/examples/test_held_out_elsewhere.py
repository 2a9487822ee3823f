"""The examples of spans and words split as the model was split, whatever the seed, or refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")
pytest.importorskip("sklearn")

from examples.conll import data as words
from examples.conll.arguments import TokenDataArguments
from examples.held_out import FRESH, History, TrainingRows, history_of
from examples.squad import data as spans
from examples.squad.arguments import DataArguments as SpanArguments
from examples.squad.articles import write_articles

UNKNOWN = History(unknown="`model_name_or_path` x")


def reloaded(rows: TrainingRows | None, folder: Path) -> History:
    """As a later run finds it beside the model."""
    assert rows is not None
    rows.save(folder)
    return history_of("model_name_or_path", [folder], must_know=True)


@pytest.fixture
def squad_file(tmp_path: Path) -> str:
    """All written articles of training in one file of 40 titles."""
    content = write_articles(0)["train"]
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"data": content["data"][:40]}), encoding="utf-8")
    return str(path)


def span_sets(data: spans.SquadData) -> list[list[str]]:
    return [[question.id for question in part] for part in (data.train, data.validation, data.test)]


def test_articles_are_dealt_as_they_were(squad_file: str, tmp_path: Path) -> None:
    arguments = SpanArguments(split_by_article=squad_file, validation_share=0.3)
    first = spans.load_data(arguments, 0)
    others = SpanArguments(split_by_article=squad_file)  # another share, another seed
    assert span_sets(spans.load_data(others, 1)) != span_sets(first)
    assert span_sets(spans.load_data(others, 1, reloaded(first.rows, tmp_path))) == span_sets(first)
    with pytest.raises(ValueError, match="has no record"):
        spans.load_data(others, 1, UNKNOWN)
    told = SpanArguments(split_by_article=squad_file, validation_share=0.3, split_seed=0)
    assert span_sets(spans.load_data(told, 1, UNKNOWN)) == span_sets(first)
    files = SpanArguments(train_file=squad_file, validation_file=squad_file, test_file=squad_file)
    with pytest.raises(ValueError, match="200 of the 200 validation rows are among the training rows"):
        spans.load_data(files, 1)


def test_written_articles_are_those_of_the_record(tmp_path: Path) -> None:
    first = spans.load_data(SpanArguments(), 0)
    again = spans.load_data(SpanArguments(), 1, reloaded(first.rows, tmp_path))
    assert [q.text for q in again.test] == [q.text for q in first.test]
    assert [q.text for q in spans.load_data(SpanArguments(), 1).test] != [q.text for q in first.test]


def test_generated_sentences_are_those_of_the_record(tmp_path: Path) -> None:
    first = words.load_data(TokenDataArguments(), 0)
    again = words.load_data(TokenDataArguments(), 1, reloaded(first.rows, tmp_path))
    assert again.validation == first.validation and again.test == first.test
    assert words.load_data(TokenDataArguments(), 1).test != first.test
    with pytest.raises(ValueError, match="has no record"):
        words.load_data(TokenDataArguments(), 1, UNKNOWN)


def test_sentences_of_a_file_are_held_out_as_they_were(tmp_path: Path) -> None:
    lines = "".join(f"The O\nword{i} B-PER\nends O\n\n" for i in range(60))
    for name in ("train", "test"):
        (tmp_path / f"{name}.conll").write_text(lines.replace("word", name))
    files: dict[str, Any] = {name: str(tmp_path / f"{name[:-5]}.conll") for name in ("train_file", "test_file")}
    first = words.load_data(TokenDataArguments(**files, validation_share=0.25), 0)
    history = reloaded(first.rows, tmp_path)
    again = words.load_data(TokenDataArguments(**files), 1, history)
    assert again.validation == first.validation and len(again.validation) == 15
    with pytest.raises(ValueError, match="--validation_file"):
        words.load_data(TokenDataArguments(**files), 1, UNKNOWN)
    held_out = TokenDataArguments(**files, validation_file=files["train_file"])
    with pytest.raises(ValueError, match="45 of the 60 validation rows were trained on"):
        words.load_data(held_out, 1, history)
