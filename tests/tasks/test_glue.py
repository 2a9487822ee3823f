"""The GLUE rows, their metrics, and the readers of the official files: real ones where they are, written ones here."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from bayeformers.tasks import GLUE_TASKS, read_split, read_task, read_tsv

needs_data = pytest.mark.skipif("BAYEFORMERS_DATA" not in os.environ, reason="BAYEFORMERS_DATA is not set")


def real(folder: str) -> Path:
    return Path(os.environ["BAYEFORMERS_DATA"]) / "glue" / folder


def write(path: Path, *lines: str, bom: bool = False) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8-sig" if bom else "utf-8")
    return path


OFFICIAL = {"cola": 2, "sst2": 2, "mrpc": 2, "stsb": 1, "qqp": 2, "mnli": 3, "qnli": 2, "rte": 2, "wnli": 2}


def test_every_task_is_a_complete_row() -> None:
    assert set(OFFICIAL) <= set(GLUE_TASKS)
    for name, task in GLUE_TASKS.items():
        assert task.name == name and task.metrics and len(task.tsv.columns) == len(task.columns)
        assert name not in OFFICIAL or task.num_labels == OFFICIAL[name]
        assert task.is_regression or len(task.label_values) == task.num_labels


# --- Official layouts ------------------------------------------------------------------------------------------------
LAYOUTS = {
    "cola": ["gj04\t1\t\tThe dog's \"bone\".", "gj04\t0\t*\tDog the."],
    "sst2": ["sentence\tlabel", "fine film \t1", "no \t0"],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t1\t2\tHe said "a.\tHe said.', "0\t3\t4\ta\tb"],
    "stsb": [
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tg\tf\t2012\t1\tn\tn\ta\tb\t5.000", "1\tg\tf\t2012\t1\tn\tn\tc\td\t0.250",
    ],
    "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ta ?\tb ?\t1", "2\t2\t3\tc ?\td ?\t0"],
    "mnli": [
        "index\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tp\tg\ta\tb\tneutral\tcontradiction", "1\tp\tg\tc\td\tneutral\tentailment",
    ],
    "qnli": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tThat.\tnot_entailment", "1\tWho?\tHe.\tentailment"],
    "rte": ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tnot_entailment", "1\tc\td\tentailment"],
    "wnli": ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\t1", "1\tc\td\t0"],
}  # fmt: skip
LABELS = {"stsb": [5.0, 0.25], "mnli": [2, 0]}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_official_layout_is_read(tmp_path: Path, name: str) -> None:
    task = GLUE_TASKS[name]
    for file in task.tsv.files.values():
        write(tmp_path / file, *LAYOUTS[name], bom=name == "mrpc")
    rows = read_split(task, tmp_path, "train")
    assert list(rows) == [*task.columns, "label"]
    assert rows["label"] == LABELS.get(name, [1, 0])
    assert all(text and text == text.strip() for column in task.columns for text in rows[column])
    assert set(read_task(task, tmp_path)) == set(task.tsv.files)


def test_quotation_marks_and_other_line_separators_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "train.tsv", "sentence\tlabel", '"half a quote\t1', "one\u2028line\x85only\t0")
    assert read_tsv(GLUE_TASKS["sst2"], path)["sentence"] == ['"half a quote', "one\u2028line\x85only"]


def test_windows_line_ends_and_empty_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "f.tsv").write_bytes(b"sentence\tlabel\r\nfine\t1\r\n\r\n")
    assert read_tsv(GLUE_TASKS["sst2"], tmp_path / "f.tsv") == {"sentence": ["fine"], "label": [1]}


def test_unlabelled_file_has_text_only(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", "index\tsentence1\tsentence2", "0\ta\tb")
    assert read_tsv(GLUE_TASKS["rte"], path, labelled=False) == {"sentence1": ["a"], "sentence2": ["b"]}


def test_shifted_rows_leave_the_validation_set(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "a\t1\t\tone", "a\t1\t\tone", "b\t0\t*\ttwo", "a\t0\t\tthree")
    write(tmp_path / "out_of_domain_dev.tsv", "a\t1\t\tone", "b\t0\t*\ttwo")
    splits = read_task(GLUE_TASKS["cola"], tmp_path)
    assert splits["validation"] == {"sentence": ["one", "three"], "label": [1, 0]}
    assert splits["shifted"] == {"sentence": ["one", "two"], "label": [1, 0]}


# --- Errors ----------------------------------------------------------------------------------------------------------
def test_missing_folder_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_task(GLUE_TASKS["cola"], tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="none of cola's files: train.tsv, dev.tsv, out_of_domain_dev.tsv"):
        read_task(GLUE_TASKS["cola"], tmp_path)
    write(tmp_path / "dev.tsv", *LAYOUTS["sst2"])
    with pytest.raises(FileNotFoundError, match=r"train.tsv does not exist. TSV files in its folder: dev.tsv"):
        read_split(GLUE_TASKS["sst2"], tmp_path, "train")
    with pytest.raises(ValueError, match="`split` must be one of 'train', 'validation' for sst2, got 'test'"):
        read_split(GLUE_TASKS["sst2"], tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("sst2", ["sentence\tlabel", "fine\t1", "no tab here"], "line 3: 1 columns where 2 are expected"),
        ("cola", ["gj04\t1\t\tgood", "gj04\t1\tgood"], "line 2: 3 columns where 4 are expected"),
        ("sst2", ["sentence\tlabel", "fine\tpositive"], "line 2: label 'positive' is not one of '0', '1'"),
        ("mnli", [LAYOUTS["mnli"][0], "0\tp\tg\ta\tb\tneutral\t-"], "line 2: label '-' is not one of 'entailment'"),
        (
            "stsb",
            [LAYOUTS["stsb"][0], "0\tg\tf\t2\t1\tn\tn\ta\tb\t5.2"],
            "line 2: label '5.2' is not a number from 0 to 5",
        ),
        ("stsb", [LAYOUTS["stsb"][0], "0\tg\tf\t2\t1\tn\tn\ta\tb\tnan"], "line 2: label 'nan' is not a number"),
        ("rte", ["index\tsentence1\tlabel", "0\ta\tentailment"], r"line 1: rte's column\(s\) \['sentence2'\] are not"),
        ("sst2", [], r"line 1: sst2's column\(s\) \['sentence', 'label'\] are not"),
        ("qqp", [LAYOUTS["qqp"][0], "1\t2\t3\ta ?\tb ?\t1", "torn"], "line 3: 1 columns where 6 are expected"),
    ],
)
def test_malformed_row_is_named_by_file_and_line(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_tsv(GLUE_TASKS[name], write(tmp_path / "train.tsv", *lines))
    assert "train.tsv" in str(raised.value)


def test_not_utf8_is_said(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(ValueError, match=r"train.tsv is not UTF-8"):
        read_tsv(GLUE_TASKS["sst2"], tmp_path / "train.tsv")


def test_few_torn_rows_of_qqp_are_skipped_with_a_warning(tmp_path: Path) -> None:
    lines = [LAYOUTS["qqp"][0], *["1\t2\t3\ta ?\tb ?\t1"] * 2000, "torn"]
    with pytest.warns(UserWarning, match="1 malformed rows .* line 2002"):
        assert len(read_tsv(GLUE_TASKS["qqp"], write(tmp_path / "train.tsv", *lines))["label"]) == 2000


# --- Metrics ---------------------------------------------------------------------------------------------------------
def test_classification_metrics_match_their_definitions() -> None:
    rng = np.random.default_rng(0)
    predictions, labels = rng.integers(2, size=200), rng.integers(2, size=200)
    tp, fp = ((predictions == 1) & (labels == 1)).sum(), ((predictions == 1) & (labels == 0)).sum()
    fn, tn = ((predictions == 0) & (labels == 1)).sum(), ((predictions == 0) & (labels == 0)).sum()
    found = GLUE_TASKS["mrpc"].compute_metrics(predictions, labels)
    assert found == pytest.approx({"accuracy": (tp + tn) / 200, "f1": 2 * tp / (2 * tp + fp + fn)})
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert GLUE_TASKS["cola"].compute_metrics(predictions, labels) == pytest.approx({"matthews_correlation": matthews})


def test_regression_metrics_match_their_definitions() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(100)
    predictions = labels + rng.random(100)
    found = GLUE_TASKS["stsb"].compute_metrics(predictions, labels)
    ranks = [np.argsort(np.argsort(values)) for values in (predictions, labels)]
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_constant_predictions_have_no_correlation() -> None:
    assert GLUE_TASKS["stsb"].compute_metrics([1.0, 1.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert GLUE_TASKS["cola"].compute_metrics([1, 1], [0, 1]) == {"matthews_correlation": 0.0}


# --- Real files ------------------------------------------------------------------------------------------------------
@needs_data
@pytest.mark.parametrize(
    ("name", "folder", "sizes"),
    [
        ("cola", "CoLA", {"train": 8551, "validation": 527, "shifted": 516}),
        ("sst2", "SST-2", {"train": 67349, "validation": 872}),
        ("mrpc", "MRPC", {"train": 3667, "validation": 408}),
        ("stsb", "STS-B", {"train": 5749, "validation": 1500}),
        ("qnli", "QNLI", {"validation": 5463}),
    ],
)
def test_real_files(name: str, folder: str, sizes: dict[str, int]) -> None:
    splits = read_task(GLUE_TASKS[name], real(folder))
    assert {split: len(rows["label"]) for split, rows in splits.items()} == sizes
    assert all(text for rows in splits.values() for column in GLUE_TASKS[name].columns for text in rows[column])


@needs_data
def test_real_unlabelled_file() -> None:
    assert len(read_tsv(GLUE_TASKS["mrpc"], real("MRPC") / "test.tsv", labelled=False)["sentence1"]) == 1725
