"""Questions of files and of the generator: which sets they make, and which rows are held out."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from bayeformers.experiments import FRESH, History, SquadArguments, SquadData, TrainingRows, history_of, load_squad_data
from examples.data.articles import SHIFTED, write_articles

from ..tasks.test_squad import official

UNKNOWN = History(unknown="`model_name_or_path` x")


def load(seed: int = 0, history: History = FRESH, **flags: Any) -> SquadData:
    return load_squad_data(SquadArguments(**flags), seed, history, written=write_articles)


def test_files_play_their_parts(tmp_path: Path) -> None:
    one, two, three = (str(tmp_path / name) for name in ("train-v2.0.json", "dev-v2.0.json", "other.json"))
    for path, articles in ((one, 5), (two, 2), (three, 1)):
        Path(path).write_text(json.dumps(official(articles, articles, asks=f"where {articles} ?")))
    data = load(split_by_article=one)
    assert [len(part) for part in data.sets.values()] == [15, 5, 5] and data.asks_unanswerable
    data = load(data_dir=str(tmp_path))
    assert [len(part) for part in data.sets.values()] == [20, 5, 4]
    data = load(train_file=one, validation_file=two)  # as SQuAD's dev set: reported
    assert [len(part) for part in data.sets.values()] == [20, 5, 4]
    data = load(train_file=one, validation_file=two, test_file=three, shifted_file=three)
    assert [len(part) for part in data.sets.values()] == [25, 4, 1, 1]
    assert data.sets["shifted"][0].group == SHIFTED
    data = load(split_by_article=one, max_train_samples=4, max_eval_samples=3)
    assert [len(part) for part in data.sets.values()] == [4, 3, 3]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train_file": "a"}, ValueError, "`train_file` 'a' needs a `validation_file` or a `test_file`"),
        ({"validation_file": "a"}, ValueError, "`validation_file` 'a' needs a `train_file`"),
        ({"train_file": "a", "data_dir": "b"}, ValueError, "exclude each other"),
        (
            {"max_answer_length": 40, "doc_stride": 30},
            ValueError,
            "0 < answer <= stride < sequence, got 40, 30 and 384",
        ),
        ({"validation_share": 0.7}, ValueError, "`validation_share` .* got 0.7"),
        ({"max_train_samples": 1}, ValueError, "`max_train_samples` must be at least 2, got 1"),
        ({"split_by_article": "nowhere.json"}, FileNotFoundError, "nowhere.json does not exist"),
        ({"data_dir": "nowhere"}, FileNotFoundError, "has no train-v1.1.json"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(**given)


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


def ids(data: SquadData) -> list[list[str]]:
    return [[question.id for question in data.sets[name]] for name in ("train", "validation", "test")]


def test_articles_are_dealt_as_they_were(squad_file: str, tmp_path: Path) -> None:
    first = load(0, split_by_article=squad_file, validation_share=0.3)
    others = {"split_by_article": squad_file}  # another share, another seed
    assert ids(load(1, **others)) != ids(first)
    assert ids(load(1, reloaded(first.rows, tmp_path), **others)) == ids(first)
    with pytest.raises(ValueError, match="has no record"):
        load(1, UNKNOWN, **others)
    assert ids(load(1, UNKNOWN, **others, validation_share=0.3, split_seed=0)) == ids(first)
    with pytest.raises(ValueError, match="200 of the 200 validation rows are among the training rows"):
        load(1, train_file=squad_file, validation_file=squad_file, test_file=squad_file)


def test_written_articles_are_those_of_the_record(tmp_path: Path) -> None:
    first = load(0)
    again = load(1, reloaded(first.rows, tmp_path))
    assert again.sets["test"] == first.sets["test"] != load(1).sets["test"]
