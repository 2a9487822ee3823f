"""The rows of a GLUE task: which train, which are held out, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from bayeformers.experiments import GlueArguments, GlueData, load_glue_data
from examples.data.grammar import generate

pytest.importorskip("datasets")


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def load_data(**arguments: Any) -> GlueData:
    return load_glue_data(GlueArguments(**arguments), seed=0, embedded=generate)


def test_validation_is_held_out_of_train_and_shift_out_of_dev(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", *(f"a\t{i % 2}\t\tsentence {i}" for i in range(50)))
    write(tmp_path / "dev.tsv", *(f"a\t1\t\tdev {i}" for i in range(6)))
    write(tmp_path / "out_of_domain_dev.tsv", *(f"a\t1\t\tdev {i}" for i in range(2)))
    data = load_data(task_name="cola", data_dir=str(tmp_path), validation_share=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 10, 4)
    assert data.shifted is not None and data.shifted["sentence"][:] == ["dev 0", "dev 1"]
    assert not set(data.train["sentence"]) & set(data.validation["sentence"])


def test_missing_train_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "dev.tsv", "index\tquestion\tsentence\tlabel", "0\ta\tb\tentailment")
    with pytest.raises(FileNotFoundError, match=r"lacks train.tsv of qnli"):
        load_data(task_name="qnli", data_dir=str(tmp_path))


def test_offline_hub_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(OSError, match=r"no network\nWithout network, give --data_dir a folder .*train.tsv, dev.tsv"):
        load_data(task_name="rte")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_name": "cula"}, "`task_name` must be one of cola, sst2"),
        ({"data_dir": "x"}, "`data_dir` 'x' needs a `task_name`"),
        ({"validation_share": 1.0}, "`validation_share` must lie between 0 and 1, got 1.0"),
        ({"max_train_samples": 1}, "`max_train_samples` must be at least 2, got 1"),
    ],
)
def test_wrong_data_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlueArguments(**changes)
