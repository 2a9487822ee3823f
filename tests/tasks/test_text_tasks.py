"""TREC and CLINC150: official layouts, the hub's copies, and files that are not what they should be."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bayeformers.tasks import TEXT_TASKS, TextTask, load_text_task, read_clinc, read_trec
from bayeformers.tasks.clinc import INTENTS
from bayeformers.tasks.text import from_hub
from bayeformers.tasks.trec import KINDS, read_questions

needs_data = pytest.mark.skipif("BAYEFORMERS_DATA" not in os.environ, reason="BAYEFORMERS_DATA is not set")


# --- TREC ------------------------------------------------------------------------------------------------------------
def trec(folder: Path, *lines: str, encoding: str = "latin-1") -> Path:
    for name in ("train.txt", "test.txt"):
        (folder / name).write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return folder


def test_trec_label_is_the_coarse_kind_and_the_text_all_behind_the_first_space(tmp_path: Path) -> None:
    splits = read_trec(trec(tmp_path, "DESC:manner How did it end ?", "NUM:date When was 9 : 30 ?", ""))
    assert set(splits) == {"train", "validation"} and splits["train"] == splits["validation"]
    assert splits["train"] == {"text": ["How did it end ?", "When was 9 : 30 ?"], "label": [1, 5]}
    assert tuple(sorted(KINDS)) == KINDS and TEXT_TASKS["trec"].num_labels == 6


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
def test_trec_accents_are_read_in_either_encoding(tmp_path: Path, encoding: str) -> None:
    path = trec(tmp_path, "LOC:city Where is Malmö ?", "HUM:ind Who is Ælfred\x85 then ?", encoding=encoding)
    assert read_questions(path / "train.txt")["text"] == ["Where is Malmö ?", "Who is Ælfred\x85 then ?"]


def test_trec_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"LOC:city Where ?\r\nLOC:city There ?\r\n")
    assert read_questions(tmp_path / "q.txt")["text"] == ["Where ?", "There ?"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["LOC:city Where ?", "PLACE:city Where ?"], r"train.txt, line 2: label 'PLACE' is not one of 'ABBR', 'DESC'"),
        (["LOC Where ?"], "line 1: expected 'COARSE:fine question', got 'LOC Where"),
        (["LOC:city"], "line 1: expected 'COARSE:fine question'"),
        (["LOC:city   "], "line 1: expected 'COARSE:fine question'"),
        (["loc:city Where ?"], "line 1: label 'loc' is not one of"),
        ([], "train.txt holds no questions"),
    ],
)
def test_trec_malformed_line_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trec(trec(tmp_path, *lines))


def test_trec_missing_file_names_those_beside(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("LOC:city Where ?\n")
    with pytest.raises(FileNotFoundError, match=r"test.txt does not exist. Text files in its folder: train.txt"):
        read_trec(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist. Text files in its folder: none"):
        read_trec(tmp_path / "nowhere")


# --- CLINC150 --------------------------------------------------------------------------------------------------------
CONTENT: dict[str, Any] = {
    "train": [["what is my balance", "balance"], ["ring me at six", "alarm"]],
    "val": [["how much money is there", "balance"]],
    "test": [["wake me", "alarm"], ["is there money", "balance"]],
    "oos_test": [["how tall is the tower", "oos"]],
    "oos_val": [["who won", "oos"]],
}


def clinc(folder: Path, **changes: Any) -> Path:
    content = {key: rows for key, rows in {**CONTENT, **changes}.items() if rows is not None}
    (folder / "data_full.json").write_text(json.dumps(content))
    return folder


def test_clinc_splits_and_labels(tmp_path: Path) -> None:
    splits = read_clinc(clinc(tmp_path))
    assert list(splits) == ["train", "validation", "test", "shifted", "oos_validation"]
    balance, alarm = INTENTS.index("balance"), INTENTS.index("alarm")
    assert splits["train"] == {"text": ["what is my balance", "ring me at six"], "label": [balance, alarm]}
    assert splits["test"]["label"] == [alarm, balance]
    assert splits["shifted"] == {"text": ["how tall is the tower"]} and splits["oos_validation"] == {
        "text": ["who won"]
    }
    assert read_clinc(tmp_path / "data_full.json") == splits
    assert len(INTENTS) == len(set(INTENTS)) == 150 and tuple(sorted(INTENTS)) == INTENTS


def test_the_first_clinc_rows_are_of_all_classes(tmp_path: Path) -> None:
    """The files are sorted by intent; every row stays beside its label, in an order that is always the same."""
    rows = [[f"{intent} {i}", intent] for intent in INTENTS[:10] for i in range(20)]
    first, again = (load_text_task("clinc", clinc(tmp_path, train=rows))["train"] for _ in range(2))
    assert len(set(first["label"][:40])) == 10 and list(first["text"]) == list(again["text"])
    assert sorted(zip(first["text"], first["label"], strict=True)) == sorted(
        (text, INTENTS.index(intent)) for text, intent in rows
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": None}, "must hold train, val, test; it lacks val and has train, test, oos_test"),
        ({"train": {}}, r"`train` must be a list of \[sentence, intent\]"),
        ({"test": []}, r"`test` must be a list of \[sentence, intent\] with a row or more"),
        ({"train": [["a", "alarm"], ["b"]]}, r"`train`, row 2: expected \[sentence, intent\], got \['b'\]"),
        ({"train": [["a", 3]]}, r"`train`, row 1: expected \[sentence, intent\]"),
        ({"train": [[" ", "alarm"]]}, "`train`, row 1: the sentence is empty"),
        ({"val": [["a", "alarm"], ["b", "alarms"]]}, "`val`, row 2: 'alarms' is not one of CLINC150's 150 intents"),
        ({"val": [["a", "oos"]]}, "`val`, row 1: 'oos' is not one of"),
        ({"oos_test": [["a", "oos"], ["b", "alarm"]]}, "`oos_test`, row 2: expected 'oos' as the intent, got 'alarm'"),
    ],
)
def test_clinc_wrong_shape_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_clinc(clinc(tmp_path, **changes))
    assert "data_full.json" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[["a", "alarm"]]', "must hold one JSON object with train, val, test, got a list"),
        (b'{"train": [', r"data_full.json is not JSON"),
        ('{"train": [["Malmö", "alarm"]]}'.encode("latin-1"), r"data_full.json is not UTF-8 text"),
    ],
)
def test_clinc_not_the_file_at_all(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data_full.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_clinc(tmp_path)


def test_clinc_missing_file_names_those_beside(tmp_path: Path) -> None:
    (tmp_path / "data_small.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"data_full.json does not exist. JSON files .*: data_small.json"):
        read_clinc(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        read_clinc(tmp_path / "nowhere")


# --- As datasets -----------------------------------------------------------------------------------------------------
def test_loaded_as_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    loaded = load_text_task("trec", trec(tmp_path, "LOC:city Where ?"))
    assert loaded["train"][0] == {"text": "Where ?", "label": 4} and set(loaded) == {"train", "validation"}
    shifted = load_text_task("clinc", clinc(tmp_path))["shifted"]
    assert shifted.column_names == ["text"]


def hub_copy(names: list[str], **splits: list[tuple[str, str]]) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    column = {"trec": "coarse_label", "clinc": "intent"}["clinc" if "oos" in names else "trec"]
    features = datasets.Features({"text": datasets.Value("string"), column: datasets.ClassLabel(names=names)})
    return {
        name: datasets.Dataset.from_dict(
            {"text": [text for text, _ in rows], column: [names.index(of) for _, of in rows]}, features=features
        )
        for name, rows in splits.items()
    }


def text_task(name: str) -> TextTask:
    task = TEXT_TASKS[name]
    assert isinstance(task, TextTask)
    return task


def test_the_hubs_labels_are_taken_by_name() -> None:
    names = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]  # the hub's order
    found = from_hub(text_task("trec"), hub_copy(names, train=[("a ", "ENTY")], test=[("b", "DESC")]))
    assert found == {"train": {"text": ["a"], "label": [2]}, "validation": {"text": ["b"], "label": [1]}}


def test_the_hubs_rows_outside_are_the_shifted_ones() -> None:
    rows = [("a", "oos"), ("b", "alarm")]
    hub = hub_copy(["restaurant_reviews", "oos", "alarm"], train=rows, validation=rows, test=rows)
    found = from_hub(text_task("clinc"), hub)
    assert found["train"] == {"text": ["b"], "label": [INTENTS.index("alarm")]}
    assert found["shifted"] == {"text": ["a"]} and set(found) == {"train", "validation", "test", "shifted"}


def test_a_hub_copy_of_another_make_is_refused() -> None:
    hub = hub_copy(["oos", "unheard_of"], train=[("a", "unheard_of")], validation=[], test=[])
    with pytest.raises(ValueError, match="label 'unheard_of' is not one of 'accept_reservations'"):
        from_hub(text_task("clinc"), hub)
    with pytest.raises(ValueError, match="clinc/clinc_oos lacks the splits validation, test; it has train"):
        from_hub(text_task("clinc"), {"train": hub["train"]})
    with pytest.raises(ValueError, match="lacks the columns intent; it has text, label"):
        from_hub(text_task("clinc"), {name: rows.rename_column("intent", "label") for name, rows in hub.items()})


# --- Real files ------------------------------------------------------------------------------------------------------
@needs_data
def test_real_files() -> None:
    data = Path(os.environ["BAYEFORMERS_DATA"])
    sizes = {name: len(split["text"]) for name, split in read_clinc(data / "clinc").items()}
    assert sizes == {
        "train": 15_000, "validation": 3_000, "test": 4_500, "shifted": 1_000, "oos_validation": 100, "oos_train": 100,
    }  # fmt: skip
    assert set(read_clinc(data / "clinc")["train"]["label"]) == set(range(150))
    assert {name: len(split["label"]) for name, split in read_trec(data / "trec").items()} == {
        "train": 5_452, "validation": 500,
    }  # fmt: skip
    assert any("sisterðcity" in text for text in read_trec(data / "trec")["train"]["text"])
