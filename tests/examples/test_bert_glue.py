"""The example end to end, at a reduced size, and its arguments and data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

from examples.bert_glue import EMBEDDED, PRETRAINED, main, parse_arguments

SMALL = [
    "--max_train_samples", "64", "--max_eval_samples", "40", "--num_train_epochs", "1", "--bayesian_epochs", "1",
    "--num_eval_samples", "3", "--delta", "0.5", "--prior_precision", "marglik", "--use_cpu", "--disable_tqdm", "true",
]  # fmt: skip
ENTAILMENT = ["index\tsentence1\tsentence2\tlabel"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    return main([*SMALL, "--output_dir", str(folder), "--report", str(folder / "page.html")]), folder


@pytest.fixture(scope="module")
def both(run: tuple[dict[str, Any], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of two processes: the saved models of `run` again, and Laplace around its deterministic one."""
    folder, trained = tmp_path_factory.mktemp("both"), run[1]
    model = ["--model_name_or_path", str(trained / "deterministic")]
    runs = {"again": [*SMALL, "--eval_only", str(trained)], "laplace": [*TRAINED, *model, "--method", "laplace"]}
    arguments = json.dumps([[*flags, "--output_dir", str(folder / name)] for name, flags in runs.items()])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.examples.worker", "bert_glue", arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return {name: json.loads((folder / name / "results.json").read_text()) for name in runs}


# --- The embedded task -----------------------------------------------------------------------------------------------
def test_results_hold_every_number(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    assert json.loads((folder / "results.json").read_text())["methods"].keys() == results["methods"].keys()
    assert list(results["methods"]) == ["majority class", "deterministic", "deterministic + temperature", "Bayesian"]
    for report in results["methods"].values():
        assert list(report["groups"]) == ["in-domain", "clean", "noisy", "shifted"]
        for numbers in report["groups"].values():
            assert list(numbers) == [
                "accuracy", "matthews", "nll", "ece", "brier", "aurc", "error_auroc",
                "entropy", "aleatoric", "epistemic",
            ]  # fmt: skip
            assert numbers["entropy"] == pytest.approx(numbers["aleatoric"] + numbers["epistemic"], abs=1e-6)
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "shifted (apart)" in page and '<mark style="--a:' in page  # words of the last posterior are coloured
    bayesian = results["methods"]["Bayesian"]
    assert list(bayesian["ood_auroc"]) == ["epistemic", "entropy", "max_probability"]
    assert bayesian["groups"]["shifted"]["epistemic"] > 0
    assert results["temperature"] > 0
    assert results["chosen"]["deterministic + temperature"] == {"T": results["temperature"]}
    accuracy, ends = (bayesian[key]["in-domain"]["accuracy"] for key in ("groups", "intervals"))
    assert ends["low"] <= accuracy <= ends["high"] and set(bayesian["intervals"]) == {"in-domain", "shifted"}


def test_predictions_and_figure_are_written(run: tuple[dict[str, Any], Path]) -> None:
    _, folder = run
    rows = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 80 and {row["set"] for row in rows} == {"test", "shifted"}
    for method in ("deterministic", "deterministic+temperature", "Bayesian"):
        total = [float(row[f"{method}:p_acceptable"]) + float(row[f"{method}:p_unacceptable"]) for row in rows]
        assert total == pytest.approx([1.0] * 80, abs=1e-5)
    assert all(float(row["Bayesian:epistemic"]) >= 0 for row in rows)
    for row in rows:
        assert row["label"] in ("acceptable", "unacceptable")
        p = float(row["Bayesian:p_acceptable"])
        assert row["Bayesian:predicted"] == ("acceptable" if p > 0.5 else "unacceptable")
        assert row["Bayesian:right"] == str(int(row["label"] == row["Bayesian:predicted"]))
    assert (folder / "uncertainty.png").read_bytes().startswith(b"\x89PNG")


def test_saved_models_give_the_same_numbers(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results, folder = run
    again = main([*SMALL, "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    assert flat(again["methods"]) == pytest.approx(flat(results["methods"]), abs=1e-6)
    alone = main([*SMALL, "--eval_only", str(folder / "bayesian"), "--output_dir", str(tmp_path)])
    kept = {name: results["methods"][name] for name in ("majority class", "Bayesian")}
    assert flat(alone["methods"]) == pytest.approx(flat(kept), abs=1e-6)


def test_two_processes_give_the_same_numbers(run: tuple[dict[str, Any], Path], both: dict[str, Any]) -> None:
    again = both["again"]
    assert again["processes"] == 2
    assert flat(again["methods"]) == pytest.approx(flat(run[0]["methods"]), abs=1e-5)


# --- Laplace ---------------------------------------------------------------------------------------------------------
TRAINED = [*SMALL, "--num_train_epochs", "0"]  # the last of two equal flags counts
POSTERIORS = {
    "linearized": "Bayesian, linearised", "bayesian": "variational", "laplace_last_layer": "Laplace last layer",
    "laplace": "Laplace all layers",
}  # fmt: skip
POINTS = ["majority class", "deterministic", "deterministic + temperature"]


@pytest.fixture(scope="module")
def everything(run: tuple[dict[str, Any], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Every method around the deterministic model of `run`."""
    folder = tmp_path_factory.mktemp("all")
    model = ["--model_name_or_path", str(run[1] / "deterministic")]
    return main([*TRAINED, *model, "--method", "all", "--output_dir", str(folder)]), folder


def test_all_methods_in_one_table_file_and_figure(everything: tuple[Any, Path]) -> None:
    results, folder = everything
    assert list(results["methods"]) == [*POINTS, *POSTERIORS.values()]
    assert set(results["chosen"]) == {POINTS[-1], *POSTERIORS.values()}
    for title in POSTERIORS.values():
        report = results["methods"][title]
        assert report["groups"]["shifted"]["epistemic"] > 0
        assert list(report["ood_auroc"]) == ["epistemic", "entropy", "max_probability"]
    assert results["delta"] == 0.5 and set(results["laplace"]) == {"Laplace last layer", "Laplace all layers"}
    for fitted in results["laplace"].values():
        assert fitted["prior_precision"] > 0 > fitted["log_marginal_likelihood"]
    header = next(csv.reader((folder / "predictions.csv").open(encoding="utf-8")))
    assert {"variational:epistemic", "Laplace_last_layer:epistemic", "Laplace_all_layers:epistemic"} <= set(header)
    assert (folder / "uncertainty.png").read_bytes().startswith(b"\x89PNG")


def test_saved_posteriors_give_the_same_numbers(everything: tuple[Any, Path], tmp_path: Path) -> None:
    results, folder = everything
    again = main([*SMALL, "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    assert flat(again["methods"]) == pytest.approx(flat(results["methods"]), abs=1e-5)
    assert again["laplace"]["Laplace all layers"]["prior_precision"] == pytest.approx(
        results["laplace"]["Laplace all layers"]["prior_precision"]
    )
    alone = main([*SMALL, "--eval_only", str(folder / "laplace"), "--output_dir", str(tmp_path)])
    assert list(alone["methods"]) == ["majority class", "Laplace all layers"] and "delta" not in alone


def test_laplace_in_two_processes_is_that_of_one(everything: tuple[Any, Path], both: dict[str, Any]) -> None:
    two, name = both["laplace"], "Laplace all layers"
    assert two["processes"] == 2 and "delta" not in two
    assert list(two["methods"]) == [*POINTS, name]
    one = everything[0]["laplace"][name]
    for fact in ("prior_precision", "log_marginal_likelihood"):  # sums of float32 in another order
        assert two["laplace"][name][fact] == pytest.approx(one[fact], rel=1e-4)
    # ranks (AURC, AUROC) may swap two of 40 nearly equal inputs; at both ends of 300 resamples too
    for report in (two["methods"][name], everything[0]["methods"][name]):
        report.pop("intervals")
    assert flat(two["methods"][name]) == pytest.approx(flat(everything[0]["methods"][name]), abs=5e-3)


def flat(tree: Any, path: str = "") -> dict[str, float]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: value for key, item in tree.items() for name, value in flat(item, f"{path}/{key}").items()}


# --- GLUE tasks from files -------------------------------------------------------------------------------------------
@pytest.fixture
def encoder(run: tuple[dict[str, Any], Path], tmp_path: Path) -> str:
    """A model and tokenizer folder that stands for a pretrained one: the embedded task's."""
    return str(run[1] / "deterministic")


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


WITHOUT_DELTA = [argument for argument in SMALL if argument not in ("--delta", "0.5")]


def test_regression_task(encoder: str, tmp_path: Path) -> None:
    lines = [
        "index\tsentence1\tsentence2\tscore",
        *(f"{i}\tthe dog\tthe cat {'cat ' * (i % 5)}\t{i % 5}" for i in range(40)),
    ]
    write(tmp_path / "train.tsv", *lines)
    write(tmp_path / "dev.tsv", *lines[:20])
    write(tmp_path / "ood.tsv", "sentence1\tsentence2", *(f"a b {i}\tc" for i in range(10)))
    results = main(
        [*WITHOUT_DELTA, "--task_name", "stsb", "--data_dir", str(tmp_path), "--model_name_or_path", encoder,
         "--ood_data_file", str(tmp_path / "ood.tsv"), "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert results["fitted_noise"] > 0 and 0 < results["delta"] <= 1
    bayesian = results["methods"]["Bayesian"]
    assert {"pearson", "spearman", "rmse", "nll"} <= set(bayesian["groups"]["in-domain"])
    assert set(bayesian["groups"]["shifted"]) == {"total_std", "aleatoric_std", "epistemic_std"}
    assert set(bayesian["ood_auroc"]) == {"epistemic", "variance"}
    laplace = main(
        [*WITHOUT_DELTA, "--task_name", "stsb", "--data_dir", str(tmp_path), "--model_name_or_path", encoder,
         "--method", "laplace", "--laplace_subset", "last_layer", "--output_dir", str(tmp_path / "laplace")]
    )  # fmt: skip
    report = laplace["methods"]["Laplace last layer"]["groups"]["in-domain"]
    fitted = laplace["laplace"]["Laplace last layer"]["noise_std"]
    assert report["aleatoric_std"] == pytest.approx(fitted, rel=1e-5) and report["epistemic_std"] > 0


def test_three_classes_and_a_mismatched_set(encoder: str, tmp_path: Path) -> None:
    labels = ("entailment", "neutral", "contradiction")
    lines = ["sentence1\tsentence2\tgold_label", *(f"the dog {i}\tthe cat\t{labels[i % 3]}" for i in range(40))]
    for name in ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        write(tmp_path / name, *lines)
    results = main(
        [*SMALL, "--task_name", "mnli", "--data_dir", str(tmp_path), "--model_name_or_path", encoder,
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert set(results["methods"]["Bayesian"]["groups"]) == {"in-domain", "shifted"}
    assert (tmp_path / "out" / "uncertainty.png").is_file()


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`eval_only` .* holds no saved model"):
        main([*SMALL, "--eval_only", str(tmp_path), "--output_dir", str(tmp_path)])


def test_glue_task_needs_a_model(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", *(f"a\t{i % 2}\t\tsentence {i}" for i in range(50)))
    write(tmp_path / "dev.tsv", "a\t1\t\tdev")
    with pytest.raises(ValueError, match="`model_name_or_path` is needed for the task cola"):
        main([*SMALL, "--task_name", "cola", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])


# --- Arguments -------------------------------------------------------------------------------------------------------
def test_command_line_wins_over_config_and_config_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"delta": 0.3, "learning_rate": 0.5, "freeze": False, "exclude_modules": ["pooler"]}))
    model, _, args = parse_arguments(["--config", str(path), "--delta", "0.4", "--output_dir", str(tmp_path)])
    assert (model.delta, args.learning_rate, model.freeze, model.exclude_modules) == (0.4, 0.5, False, ["pooler"])


def test_defaults_depend_on_the_task() -> None:
    embedded, glue = (
        parse_arguments(argv)[2] for argv in ([], ["--task_name", "cola", "--model_name_or_path", "bert"])
    )
    assert (embedded.learning_rate, glue.learning_rate) == (1e-3, 5e-5)


def test_help_shows_each_kind_of_task_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the task on the command line: those of both, wherever they differ from each other."""
    for argv in ([], ["--task_name", "cola"]):
        with pytest.raises(SystemExit):
            parse_arguments([*argv, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        parsed = [
            vars(group)
            for group_of_task in (
                parse_arguments([]),
                parse_arguments(["--task_name", "cola", "--model_name_or_path", "x"]),
            )
            for group in group_of_task
        ]
        embedded, glue = ({**a, **b, **c} for a, b, c in (parsed[:3], parsed[3:]))
        differing = {
            name: (embedded[name], glue[name])
            for name in (*EMBEDDED, *PRETRAINED)
            if name != "prior" and embedded[name] != glue[name]
        }
        assert len(differing) >= 10
        for name, (first, second) in differing.items():
            about = said[said.index(f"--{name} ", said.index("--help")) :]
            assert f"(default: embedded task: {first:g}; GLUE tasks: {second if second is None else f'{second:g}'}" in (
                about.replace("1.0)", "1)").replace("True", "1").replace("False", "0")
            ), name


def test_the_linearised_method_calibrates_its_own_delta() -> None:
    """The embedded task's default is the ELBO's."""
    delta = {argv: parse_arguments(argv.split())[0].delta for argv in ("", "--method linearized")}
    assert delta == {"": 0.4, "--method linearized": None}
    assert parse_arguments(["--method", "linearized", "--delta", "2"])[0].delta == 2.0
