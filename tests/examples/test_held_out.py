"""What is fitted to held-out rows never sees rows that the model was trained on, whatever the seed and the flags."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasets")

from bayeformers.experiments import (
    FRESH,
    GlueArguments,
    GlueData,
    History,
    history_of,
    load_glue_data,
    run_command,
)
from bayeformers.experiments.rows import FILE
from bayeformers.experiments.text_classification import hashes_of
from examples.bert_glue import main
from examples.data.grammar import generate

SMALL = [
    "--num_train_epochs", "2", "--num_eval_samples", "3", "--method", "laplace", "--laplace_subset", "last_layer",
    "--use_cpu", "--disable_tqdm", "true",
]  # fmt: skip
UNTRAINED = [*SMALL, "--num_train_epochs", "0"]
WORDS = ("dog", "cat", "otter", "falcon", "pig", "lynx", "crow")


def rows(first: int, count: int) -> list[str]:
    """Sentences of which no two are alike, in CoLA's layout; a third of the labels are flipped."""
    found = []
    for i in range(first, first + count):
        one, other = WORDS[i % 7], WORDS[(i // 7) % 7]
        label = (i % 2) if i % 3 else 1 - (i % 2)
        found.append(f"x\t{label}\t\tthe {one} sees {'a' if i % 2 else 'the'} {other} {'very ' * (i // 49)}often")
    return found


def load_data(arguments: GlueArguments, seed: int, history: History = FRESH) -> GlueData:
    return load_glue_data(arguments, seed, history, embedded=generate)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cola")
    write(folder / "train.tsv", rows(0, 200))
    write(folder / "dev.tsv", rows(200, 30))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stands for a pretrained model: one without a record."""
    folder = tmp_path_factory.mktemp("encoder")
    quick = ["--max_train_samples", "64", "--max_eval_samples", "40", "--num_train_epochs", "1"]
    main([*SMALL, *quick, "--output_dir", str(folder)])
    (folder / "deterministic" / FILE).unlink()
    return str(folder / "deterministic")


def task(glue: Path, *flags: str) -> list[str]:
    return ["--task_name", "cola", "--data_dir", str(glue), "--validation_share", "0.2", *flags]


@pytest.fixture(scope="module")
def run(glue: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    flags = ["--model_name_or_path", encoder, "--seed", "0", "--output_dir", str(folder)]
    return main([*SMALL, *task(glue), *flags]), folder


def chosen(results: dict[str, Any]) -> dict[str, float]:
    """T and tau."""
    found = results["chosen"]
    return {
        "T": found["deterministic + temperature"]["T"],
        "tau": found.get("Laplace last layer", {}).get("tau"),
    }


# --- The same numbers, whatever the seed -----------------------------------------------------------------------------
@pytest.mark.parametrize("flags", [["--seed", "1"], ["--seed", "2", "--validation_share", "0.5"]])
def test_eval_only_holds_out_what_training_held_out(
    flags: list[str], run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path
) -> None:
    results, folder = run
    again = main([*SMALL, *task(glue), *flags, "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    assert chosen(again) == pytest.approx(chosen(results), rel=1e-4)
    assert again["held_out"] == results["held_out"] and again["held_out"]["rows"] == 40


def test_a_model_taken_as_it_is_is_split_as_it_was(
    run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path
) -> None:
    """The curvature is that of the same training rows too."""
    results, folder = run
    flags = ["--model_name_or_path", str(folder / "deterministic"), "--seed", "1", "--output_dir", str(tmp_path)]
    again = main([*UNTRAINED, *task(glue), *flags])
    assert chosen(again) == pytest.approx(chosen(results), rel=1e-4)
    # and so is what this run saved
    third = main([*SMALL, *task(glue), "--seed", "5", "--eval_only", str(tmp_path), "--output_dir", str(tmp_path)])
    assert chosen(third) == pytest.approx(chosen(results), rel=1e-4)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_on_keeps_the_split(
    checkpoint: bool, run: tuple[dict[str, Any], Path], glue: Path, encoder: str, tmp_path: Path
) -> None:
    """A training from a model, or from a checkpoint of its training, holds out what that one held out."""
    folder = run[1] / "deterministic"
    if checkpoint:
        folder = next((run[1] / "checkpoints" / "deterministic").glob("checkpoint-*"))
    history = history_of("model_name_or_path", [folder], must_know=False)
    arguments = GlueArguments(task_name="cola", data_dir=str(glue))
    data = load_data(arguments, 7, history)
    assert history.record is not None
    assert not np.isin(hashes_of(data.validation, data.task), history.record.seen).any()
    assert len(data.validation) == 40  # by the recorded share, not the tenth of these arguments
    assert data.rows is not None and data.rows.split == history.record.split


def test_the_embedded_task_is_that_of_the_record(tmp_path: Path) -> None:
    """Its test sentences depend on the seed too: another seed's are partly this one's training."""
    quick = ["--max_train_samples", "64", "--max_eval_samples", "40", "--num_train_epochs", "1"]
    first = main([*SMALL, *quick, "--seed", "0", "--output_dir", str(tmp_path / "a")])
    again = main([
        *SMALL,
        *quick,
        "--seed",
        "1",
        "--eval_only",
        str(tmp_path / "a"),
        "--output_dir",
        str(tmp_path / "b"),
    ])
    assert chosen(again) == pytest.approx(chosen(first), rel=1e-4)
    for name, report in first["methods"].items():
        for group, numbers in report["groups"].items():
            assert again["methods"][name]["groups"][group]["nll"] == pytest.approx(numbers["nll"], abs=1e-5)


# --- Other data ------------------------------------------------------------------------------------------------------
def test_rows_of_another_file_that_were_trained_on_are_left_out(
    run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that shares a few rows with the training one, in another order and with other white space."""
    lines = [line.replace(" sees ", "  sees ") for line in rows(180, 20)] + rows(400, 180)
    write(tmp_path / "other" / "train.tsv", lines)
    write(tmp_path / "other" / "dev.tsv", rows(200, 30))
    history = history_of("model_name_or_path", [run[1] / "deterministic"], must_know=True)
    arguments = GlueArguments(task_name="cola", data_dir=str(tmp_path / "other"), validation_share=0.5)
    data = load_data(arguments, 0, history)
    assert history.record is not None
    left = hashes_of(data.validation, data.task)
    assert not np.isin(left, history.record.seen).any()
    dropped = 100 - len(left)
    assert dropped > 0
    assert f"{dropped} of the 100 validation rows were trained on and are left out" in capsys.readouterr().out


def test_a_file_of_rows_that_were_trained_on_is_refused(
    run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path
) -> None:
    write(tmp_path / "v.tsv", rows(0, 200))
    flags = ["--validation_file", str(tmp_path / "v.tsv"), "--eval_only", str(run[1])]
    with pytest.raises(ValueError, match=r"160 of the 200 rows of `validation_file` .* were trained on.*--split_seed"):
        main([*SMALL, *task(glue), *flags, "--output_dir", str(tmp_path)])


# --- What cannot be known --------------------------------------------------------------------------------------------
def test_an_unknown_history_is_refused_with_its_remedies(
    run: tuple[dict[str, Any], Path], glue: Path, encoder: str, tmp_path: Path
) -> None:
    message = r"has no record \(training_rows.json\) .* Give --validation_file, .*--split_seed"
    flags = ["--model_name_or_path", encoder, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"`model_name_or_path` .* {message}"):
        main([*UNTRAINED, *task(glue), *flags])
    shutil.copytree(run[1] / "deterministic", tmp_path / "old" / "deterministic")
    (tmp_path / "old" / "deterministic" / FILE).unlink()
    with pytest.raises(ValueError, match=f"`eval_only` .* {message}"):
        main([*SMALL, *task(glue), "--eval_only", str(tmp_path / "old"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_both_remedies_work(run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path) -> None:
    """The seed of that run gives its numbers; a file of other rows chooses by these."""
    shutil.copytree(run[1] / "deterministic", tmp_path / "old" / "deterministic")
    (tmp_path / "old" / "deterministic" / FILE).unlink()
    flags = [*SMALL, "--eval_only", str(tmp_path / "old"), "--output_dir", str(tmp_path / "out"), "--seed", "3"]
    told = main([*flags, *task(glue), "--split_seed", "0"])
    assert chosen(told)["T"] == pytest.approx(chosen(run[0])["T"], rel=1e-4)
    write(tmp_path / "v.tsv", rows(600, 50))
    given = main([*flags, *task(glue), "--validation_file", str(tmp_path / "v.tsv")])
    assert given["held_out"] == {"file": str(tmp_path / "v.tsv"), "rows": 50, "split": None}
    assert chosen(given)["T"] != pytest.approx(chosen(told)["T"], rel=1e-4)


def test_a_validation_file_is_held_out_of_train(glue: Path, tmp_path: Path) -> None:
    """Then there is no tenth; and what was trained on all of train asks for the file again."""
    write(tmp_path / "v.tsv", rows(190, 20))
    arguments = GlueArguments(task_name="cola", data_dir=str(glue), validation_file=str(tmp_path / "v.tsv"))
    data = load_data(arguments, 0)
    assert (len(data.train), len(data.validation)) == (190, 20)
    assert data.rows is not None
    data.rows.save(tmp_path)
    history = history_of("eval_only", [tmp_path], must_know=True)
    with pytest.raises(ValueError, match="trained on all of train: `validation_file` must name rows"):
        load_data(GlueArguments(task_name="cola", data_dir=str(glue)), 0, history)
    assert len(load_data(arguments, 4, history).validation) == 20


def test_contradictions_are_refused(run: tuple[dict[str, Any], Path], glue: Path, tmp_path: Path) -> None:
    _, folder = run
    with pytest.raises(ValueError, match="`split_seed` must be 0, by which the model was trained, got 4"):
        main([*SMALL, *task(glue), "--split_seed", "4", "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="holds models of the task cola: `task_name` must be given"):
        main([*SMALL, "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    shutil.copytree(folder / "deterministic", tmp_path / "two" / "deterministic")
    shutil.copytree(folder / "laplace_last_layer", tmp_path / "two" / "laplace_last_layer")
    load_data(GlueArguments(task_name="cola", data_dir=str(glue)), 9).rows.save(tmp_path / "two" / "deterministic")
    with pytest.raises(ValueError, match=r"were trained on different rows, so no row is held out for all"):
        main([*SMALL, *task(glue), "--eval_only", str(tmp_path / "two"), "--output_dir", str(tmp_path)])


# --- The record ------------------------------------------------------------------------------------------------------


# --- The command line ------------------------------------------------------------------------------------------------
EXAMPLES = (
    "bert_glue", "bert_squad", "token_classification", "image_classification", "mlp_mnist", "regression",
    "hyperparameter_search",
)  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES)
def test_unknown_flags_are_a_line_and_no_traceback(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = pytest.importorskip(f"examples.{example}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--sed", "3", "--nonsense"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("error: unknown arguments: --sed 3 --nonsense; did you mean --seed?\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("example", "flags", "message"),
    [
        ("bert_glue", ["--validation_share", "2"], "`validation_share` must lie between 0 and 1"),
        ("bert_glue", ["--config", "none.json"], "`config` none.json does not exist"),
        ("bert_glue", ["--eval_only", "nowhere"], "`eval_only` nowhere holds no saved model"),
        ("bert_glue", ["--task_name", "cola", "--data_dir", "nowhere", "--model_name_or_path", "x"], "nowhere"),
        ("bert_squad", ["--train_file", "x"], "needs a `validation_file` or a `test_file`"),
        ("token_classification", ["--train_file", "x", "--test_file", "y"], "`model_name_or_path` is needed"),
        ("image_classification", ["--data_dir", "nowhere"], "`data_dir` nowhere is not a folder"),
        ("mlp_mnist", ["--removed", "2"], "`removed` must be shares in [0, 1)"),
        ("regression", ["--prior_std", "0"], "`prior_std` must be > 0"),
        ("hyperparameter_search", ["--n_trials", "1"], "`n_trials` must be at least 2"),
    ],
)
def test_wrong_input_is_a_line_and_no_traceback(
    example: str, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pytest.importorskip(f"examples.{example}")
    monkeypatch.setattr("sys.argv", [example, *flags, "--use_cpu"])
    with pytest.raises(SystemExit) as stopped:
        run_command(module.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and ": error: " in error


def test_errors_of_the_run_itself_keep_their_traceback() -> None:
    def broken(_: Any) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        run_command(broken)
