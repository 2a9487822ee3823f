"""The question-answering example end to end, at a reduced size."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

from datasets import Dataset
from transformers import DataCollatorWithPadding

import bayeformers
from bayeformers import BayesianTrainer, to_bayesian
from bayeformers.experiments import Experiment
from bayeformers.tasks import parse_squad, read_windows
from bayeformers.tasks.windows import Reading
from examples.bert_squad import METHODS, main, parse_arguments, predict_logits
from examples.data.articles import AMBIGUOUS, GROUPS, SHIFTED, UNANSWERABLE, write_articles
from examples.data.tiny_reader import make_model, make_tokenizer

SMALL = [
    "--max_train_samples", "48", "--max_eval_samples", "40", "--num_train_epochs", "1", "--bayesian_epochs", "1",
    "--num_eval_samples", "3", "--delta", "0.5", "--use_cpu", "--disable_tqdm", "true",
]  # fmt: skip
REPORT = {"questions", "exact_match", "f1", "confidence", "nll", "in_reach", "aurc", "aurc_f1"}
ENTROPIES = {"entropy", "aleatoric", "epistemic"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    return main([*SMALL, "--output_dir", str(folder)]), folder


def test_results_hold_every_number(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    assert json.loads((folder / "results.json").read_text())["methods"].keys() == results["methods"].keys()
    assert list(results["methods"]) == list(METHODS)
    assert results["questions"] == {"train": 48, "validation": 40, "test": 40, "shifted": 40}
    for report in results["methods"].values():
        assert list(report["groups"])[-1] == SHIFTED and len(report["groups"]) >= 4
        for numbers in report["groups"].values():
            assert set(numbers) == REPORT | ENTROPIES
            assert numbers["entropy"] == pytest.approx(numbers["aleatoric"] + numbers["epistemic"], abs=1e-9)
            assert 0 <= numbers["exact_match"] <= numbers["f1"] <= 1 and numbers["in_reach"] == 1
        of_groups = [numbers for name, numbers in list(report["groups"].items())[1:-1]]
        whole = next(iter(report["groups"].values()))
        assert sum(numbers["questions"] for numbers in of_groups) == whole["questions"] == 40
        for name in ("exact_match", "f1", "nll", "epistemic"):
            average = sum(numbers["questions"] * numbers[name] for numbers in of_groups) / 40
            assert average == pytest.approx(whole[name])
    assert results["temperature"] > 0 and results["delta"] == 0.5
    for interval in results["methods"]["Bayesian"]["detection"].values():
        assert 0 <= interval["low"] <= interval["auroc"] <= interval["high"] <= 1
    difference = results["differences"]["Bayesian less deterministic"]["nll"]["difference"]
    nll = [results["methods"][name]["groups"]["all questions"]["nll"] for name in ("Bayesian", "deterministic")]
    assert difference == pytest.approx(nll[0] - nll[1])


def test_point_estimates_have_no_epistemic_part_and_the_posterior_has(run: tuple[dict[str, Any], Path]) -> None:
    methods = run[0]["methods"]
    epistemic = {name: report["groups"]["all questions"]["epistemic"] for name, report in methods.items()}
    assert epistemic["deterministic"] == epistemic["deterministic + temperature"] == 0 < epistemic["Bayesian"]
    # a temperature changes the probabilities of spans, not which is the most probable
    exact = {name: report["groups"]["all questions"]["exact_match"] for name, report in methods.items()}
    assert exact["deterministic"] == exact["deterministic + temperature"]


def test_predictions_and_figure_are_written(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    rows = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    assert len(rows) == 80 and {row["set"] for row in rows} == {"test", "shifted"}
    articles = [
        found for content in write_articles(results["seed"]).values() for found in parse_squad(content).values()
    ]
    texts = {question.id: question.context for found in articles for question in found}
    for method in ("deterministic", "deterministic+temperature", "Bayesian"):
        for row in rows:
            answer, confidence = row[f"{method}:answer"], float(row[f"{method}:confidence"])
            assert answer in texts[row["id"]]
            assert (answer == "") == math.isclose(confidence, float(row[f"{method}:no_answer"]))
            assert float(row[f"{method}:epistemic"]) >= 0
    scored = np.mean([float(row["Bayesian:exact_match"]) for row in rows if row["set"] == "test"])
    assert scored == pytest.approx(results["methods"]["Bayesian"]["groups"]["all questions"]["exact_match"])
    assert (folder / "answers.png").read_bytes().startswith(b"\x89PNG")


def test_saved_models_load(run: tuple[dict[str, Any], Path]) -> None:
    _, folder = run
    assert bayeformers.is_bayesian(bayeformers.from_pretrained(folder / "bayesian"))
    assert (folder / "deterministic" / "tokenizer.json").is_file()


# --- The trainer's logits --------------------------------------------------------------------------------------------
Windows = tuple[list[Reading], dict[str, list[Any]]]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Windows]:
    found = [row for rows in parse_squad(write_articles(0, train=6)["train"]).values() for row in rows]
    tokenizer = make_tokenizer(text for row in found for text in (row.context, row.text))
    windows = read_windows(found, tokenizer, max_length=80, stride=16)  # rare words are spelled: some need two windows
    rows = Dataset.from_dict(windows[1])
    assert len(rows) > len(windows[0])
    folder = str(tmp_path_factory.mktemp("trainer"))
    # by length: the Trainer then evaluates in another order than that of the rows
    flags = [*SMALL, "--output_dir", folder, "--per_device_eval_batch_size", "7", "--report_to", "none"]
    args = parse_arguments([*flags, "--train_sampling_strategy", "group_by_length"])[2]
    return Experiment(args, rows, rows, DataCollatorWithPadding(tokenizer), tokenizer), windows


def test_logits_are_those_of_the_draws_read_one_by_one(experiment: tuple[Experiment, Windows]) -> None:
    torch.manual_seed(0)
    setting, (readings, columns) = experiment
    model = to_bayesian(make_model(len(setting.tokenizer)), delta=0.3)
    logits = predict_logits(setting.trainer(model, "bayesian"), readings, columns)
    assert len(logits) == len(readings)
    index = next(i for i, reading in enumerate(readings) if len(reading.windows) > 1)
    row = sum(len(reading.windows) for reading in readings[:index])
    for number, window in enumerate(readings[index].windows):
        inputs = setting.train.select_columns(setting.tokenizer.model_input_names)[row + number]
        alone = {name: torch.tensor([values]) for name, values in inputs.items()}
        for s in range(3):
            with bayeformers.fixed_draw(model, seed=0, index=s), torch.no_grad():
                output = model.eval()(**alone)
            for side, name in enumerate(("start", "end")):
                found = logits[index][s, number, window.context, side]
                expected = getattr(output, f"{name}_logits")[0, window.context]
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_a_span_head_has_no_laplace_posterior(experiment: tuple[Experiment, Windows]) -> None:
    setting = experiment[0]
    trainer: BayesianTrainer = setting.trainer(make_model(len(setting.tokenizer)), "laplace")
    with pytest.raises(ValueError, match="no Laplace posterior for a 'question_answering' head"):
        trainer.fit_laplace()


def test_two_processes_give_the_same_numbers(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """Of trained models: training's batches, and with them its numbers, depend on the number of processes."""
    results = {}
    untrained = [*SMALL, "--num_train_epochs", "0", "--bayesian_epochs", "0", "--max_eval_samples", "21"]
    results[1] = main([*untrained, "--output_dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "examples.bert_squad", *untrained, "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results[2] = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results[2]["processes"] == 2
    one, two = (flat(result["methods"]) for result in results.values())
    assert two == pytest.approx(one, abs=1e-4)


def flat(tree: Any, path: str = "") -> dict[str, float]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: value for key, item in tree.items() for name, value in flat(item, f"{path}/{key}").items()}


# --- Files, and bad input --------------------------------------------------------------------------------------------
def test_official_files_of_both_versions_with_a_saved_model(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """v1.1 has no unanswerable questions: "no answer" is then no option."""
    written = write_articles(1, train=12)["train"]
    for article in written["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [row for row in paragraph["qas"] if row["answers"]]
            for row in paragraph["qas"]:
                del row["group"], row["is_impossible"]
    path = tmp_path / "v1.1.json"
    path.write_text(json.dumps({"version": "1.1", "data": written["data"]}))
    flags = ["--split_by_article", str(path), "--model_name_or_path", str(run[1] / "deterministic")]
    lengths = ["--max_seq_length", "64", "--doc_stride", "16", "--max_answer_length", "8"]
    results = main([*SMALL, *flags, *lengths, "--output_dir", str(tmp_path / "out")])
    assert not results["no_answer_is_an_option"]
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open(encoding="utf-8")))
    assert rows and all(row["Bayesian:answer"] and float(row["Bayesian:no_answer"]) == 0 for row in rows)
    assert list(results["methods"]["Bayesian"]["groups"]) == ["all questions"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split_by_article", "x.json"], "`model_name_or_path` is needed"),
        (["--patience", "0"], "`patience` must be at least 1"),
        (["--bayesian_epochs", "-1"], "`bayesian_epochs` must not be negative"),
        (["--prior", "{"], "`prior` '{' is not JSON"),
        (["--max_seq_length", "512"], "`max_seq_length` must be at most 128"),
    ],
)
def test_bad_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert not (tmp_path / "out" / "results.json").exists()


# --- Written articles ------------------------------------------------------------------------------------------------
def test_written_articles_are_a_function_of_the_seed() -> None:
    small = {"train": 5, "validation": 2, "test": 3, "shifted": 2}
    assert write_articles(3, **small) == write_articles(3, **small) != write_articles(4, **small)


def test_written_questions_are_what_their_group_says() -> None:
    written = write_articles(0, train=80, validation=20, test=60, shifted=20)
    splits = {name: parse_squad(content) for name, content in written.items()}
    rows = {name: [row for found in articles.values() for row in found] for name, articles in splits.items()}
    assert {row.group for row in rows["test"]} == set(GROUPS) and {row.group for row in rows["shifted"]} == {SHIFTED}
    for name, found in rows.items():
        for row in found:
            if row.group == AMBIGUOUS:  # one annotator in training, two elsewhere, who differ
                assert len(set(row.truths)) == (1 if name == "train" else 2)
            elif row.group == UNANSWERABLE:
                assert not row.answers
            elif row.group != SHIFTED:
                assert len(row.answers) == 1
    ids = [row.id for found in rows.values() for row in found]
    assert len(ids) == len(set(ids))


def test_the_two_right_answers_are_out_of_reach_of_each_other() -> None:
    splits = {name: parse_squad(content) for name, content in write_articles(0, train=300, test=60).items()}
    train, test = ([row for found in splits[name].values() for row in found] for name in ("train", "test"))
    tokenizer = make_tokenizer(text for row in train for text in (row.context, row.text))
    readings, _ = read_windows(test, tokenizer, max_length=64, stride=16)
    both = [reading.gold for reading in readings if reading.question.group == AMBIGUOUS]
    assert both and all(abs(first[0] - second[0]) >= 8 for first, second in both)
    gold = [span for reading in readings for span in reading.gold]
    assert gold and all(last - first < 8 for first, last in gold)  # every answer is in reach
