"""The token-classification example: a small run, its reload, and its own path from a model to words."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from datasets import Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from bayeformers import LaplacePosterior, metrics, predict, to_bayesian
from bayeformers.experiments import load_conll_data
from bayeformers.tasks import Sentence, at_words, read_conll
from bayeformers.tasks.pieces import IGNORED
from examples.data.newswire import generate
from examples.token_classification import (
    draw_words,
    fitted_temperature,
    load_model,
    main,
    mean_nll,
    parse_arguments,
    prepare,
    tempered,
)

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
SMALL = [
    "--max_train_samples", "48", "--max_eval_samples", "24", "--num_train_epochs", "2", "--bayesian_epochs", "1",
    "--num_eval_samples", "3", "--use_cpu", "--disable_tqdm", "true",
]  # fmt: skip


def random_draws(num_draws: int, num_words: int) -> np.ndarray:
    logits = 2 * np.random.default_rng(0).normal(size=(num_draws, num_words, len(NAMES)))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_temperature_of_a_point_estimate() -> None:
    draws = [random_draws(1, 50)]
    flat = tempered(draws, 2.0)[0]
    np.testing.assert_allclose(np.exp(flat).sum(-1), 1.0)
    np.testing.assert_allclose(flat - flat[..., :1], (draws[0] - draws[0][..., :1]) / 2)
    labels = [NAMES[i] for i in [np.random.default_rng(1).choice(5, p=p) for p in np.exp(flat[0])]]
    sentence = Sentence(("a",) * 50, tuple(labels))
    temperature = fitted_temperature(draws, [sentence], NAMES)

    def nll(value: float) -> float:
        numbers = [NAMES.index(label) for label in labels]
        return metrics.negative_log_likelihood(np.exp(tempered(draws, value)[0][0]), numbers)

    assert nll(temperature) < min(nll(0.9 * temperature), nll(1.1 * temperature))


# --- The run ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("run")
    return main([*SMALL, "--output_dir", str(folder), "--report", str(folder / "page.html")]), folder


METHODS = ["deterministic", "deterministic + temperature", "variational", "Laplace all layers"]


def test_results_hold_words_and_entities_of_every_group(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    assert "«" in (folder / "page.html").read_text(encoding="utf-8")
    assert list(results["methods"]) == METHODS and results["temperature"] > 0
    for name, report in results["methods"].items():
        assert list(report["groups"]) == ["in-domain", "ambiguous", "clean", "shifted"]
        is_point = name.startswith("deterministic")
        for numbers in report["groups"].values():
            words, entities = numbers["words"], numbers["entities"]
            assert words["entropy"] == pytest.approx(words["aleatoric"] + words["epistemic"], abs=1e-6)
            assert (words["epistemic"] == 0) == is_point
            assert {"precision", "recall", "f1"} <= set(entities)
            assert not is_point or entities.get("auroc_epistemic") is None
        assert report["ambiguous"]["true_aleatoric"] == pytest.approx(0.6109, abs=1e-4)
        assert set(report["shift_auroc"]) == ({"entropy"} if is_point else {"entropy", "epistemic"})
    first, second = (results["methods"][name]["groups"]["in-domain"]["words"] for name in METHODS[:2])
    assert first["accuracy"] == second["accuracy"]  # a temperature changes no decision
    facts = results["facts"]
    assert facts["variational"]["delta"] == 0.4 and facts["Laplace all layers"]["prior_precision"] > 0
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["labels"] == results["labels"]


def test_files_agree_with_each_other_and_with_the_results(run: tuple[dict[str, Any], Path]) -> None:
    results, folder = run
    words = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    entities = list(csv.DictReader((folder / "entities.csv").open(encoding="utf-8")))
    test, scheme = read_conll(str(folder / "test.conll"))
    assert scheme == "IOB2" and len(test) == 24
    assert [row["word"] for row in words if row["set"] == "test"] == [word for one in test for word in one.words]
    for method in METHODS:
        column, rows = method.replace(" + ", "+").replace(" ", "_"), [row for row in words if row["set"] == "test"]
        right = [row["label"] == row[f"{column}:label"] for row in rows]
        report = results["methods"][method]["groups"]["in-domain"]
        assert np.mean(right) == pytest.approx(report["words"]["accuracy"])
        found = [row for row in entities if row["method"] == method and row["set"] == "test"]
        share = np.mean([int(row["right"]) for row in found]) if found else 0.0
        assert share == pytest.approx(report["entities"]["precision"])
        for row in found:
            assert 0 <= float(row["probability"]) <= float(row["weakest"]) + 1e-6
    assert (folder / "entities.png").read_bytes().startswith(b"\x89PNG")


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: value for key, item in tree.items() for name, value in flat(item, f"{path}/{key}").items()}


def test_saved_models_give_the_same_numbers(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    results, folder = run
    again = main([*SMALL, "--eval_only", str(folder), "--output_dir", str(tmp_path)])
    assert flat(again["methods"]) == pytest.approx(flat(results["methods"]), abs=1e-5)
    assert again["temperature"] == pytest.approx(results["temperature"], rel=1e-4)


def test_files_with_a_model_and_another_scheme(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """BIOES in, IOB2 inside; the last layer alone; a pretrained model is the prior's mean."""
    lines = "\n\n".join("Mara B-PER\nHalden E-PER\nsaw O\nOrland S-LOC" for _ in range(12)) + "\n"
    (tmp_path / "data.txt").write_text(lines, encoding="utf-8")
    path, model = str(tmp_path / "data.txt"), str(run[1] / "deterministic")
    results = main(
        [*SMALL, "--train_file", path, "--test_file", path, "--model_name_or_path", model, "--method", "laplace",
         "--laplace_subset", "last_layer", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert results["schemes"] == {"train": "BIOES", "test": "BIOES"}
    assert results["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    assert list(results["methods"]) == [*METHODS[:2], "Laplace last layer"]
    report = results["methods"]["Laplace last layer"]
    assert set(report) == {"groups"} and list(report["groups"]) == ["in-domain"]


def save_tiny_roberta(folder: Path, words: list[str]) -> str:
    """A random model whose tokenizer works on bytes and wants a blank before each word; its attention is fused."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

    folder.mkdir()
    learned = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learned.train_from_iterator(words * 3, vocab_size=300, special_tokens=specials, show_progress=False)
    learned.save_model(str(folder))
    tokenizer = RobertaTokenizerFast.from_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    config = RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    RobertaForMaskedLM(config).save_pretrained(str(folder))
    return str(folder)


def test_another_architecture_with_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    lines = "\n\n".join(f"Mara{i} I-PER\nsaw O\nOrland I-LOC" for i in range(12)) + "\n"
    (tmp_path / "data.txt").write_text(lines, encoding="utf-8")
    path, model = str(tmp_path / "data.txt"), save_tiny_roberta(tmp_path / "roberta", ["Mara saw Orland"])
    results = main(
        [*SMALL, "--train_file", path, "--test_file", path, "--model_name_or_path", model, "--prior_precision", "10",
         "--max_seq_length", "60", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert results["schemes"]["train"] == "IOB1"
    for name in ("variational", "Laplace all layers"):
        assert results["methods"][name]["groups"]["in-domain"]["words"]["epistemic"] > 0
    assert 0 < results["facts"]["variational"]["delta"] <= 1  # found on the validation sentences
    assert results["facts"]["Laplace all layers"]["prior_precision"] == 10.0
    saved = AutoTokenizer.from_pretrained(str(tmp_path / "out" / "laplace"))
    assert saved(["saw"], is_split_into_words=True)["input_ids"]  # refused without a prefix space


# --- Draws of a model ------------------------------------------------------------------------------------------------
def test_words_of_a_model_are_those_of_predict(tmp_path: Path) -> None:
    """The example's own path from a batch to words, against `predict` on each sentence alone."""
    arguments = parse_arguments([*SMALL, "--max_train_samples", "40", "--max_eval_samples", "4",
                                 "--max_seq_length", "64", "--output_dir", str(tmp_path)])  # fmt: skip
    data = load_conll_data(arguments[1], 0, generate=generate)
    model, tokenizer = load_model(None, data)
    run = prepare(arguments, data, tokenizer)
    model = to_bayesian(model, delta=0.3)
    words = draw_words(run.experiment.trainer(model, "bayesian"), run.sets["test"])
    for found, sentence, first in zip(words, data.sets["test"], run.sets["test"][1], strict=True):
        inputs = tokenizer(list(sentence.words), is_split_into_words=True, return_tensors="pt")
        expected = predict(model, dict(inputs), num_samples=3).log_probs[:, 0, first]
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_mean_nll_is_that_of_labelled_words() -> None:
    draws, dataset = random_draws(2, 3), Dataset.from_dict({"labels": [[IGNORED, 1, 3, IGNORED]]})
    draws[:, 1] = at_words(draws.astype(np.float32), [0, -1, 1])[:, 1]
    probs = np.exp(draws).mean(0)
    expected = -(np.log(probs[0, 1]) + np.log(probs[2, 3])) / 2  # the word without a piece has no label
    assert mean_nll([draws], (dataset, [[1, -1, 2]])) == pytest.approx(expected)


def test_held_out_sentences_choose_the_prior(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """No prior precision a factor 4 away predicts the validation words better, by the same draws."""
    arguments = parse_arguments([*SMALL, "--output_dir", str(tmp_path)])
    data = load_conll_data(arguments[1], arguments[2].seed, generate=generate)
    again = prepare(arguments, data, AutoTokenizer.from_pretrained(run[1] / "laplace"))
    trainer = again.experiment.load("laplace", run[1] / "laplace", AutoModelForTokenClassification)
    posterior, validation = trainer.posterior, again.sets["validation"]
    assert isinstance(posterior, LaplacePosterior)
    nll = {}
    for factor in (0.25, 1.0, 4.0):
        trainer.posterior = posterior.with_prior_precision(factor * posterior.prior_precision)
        nll[factor] = mean_nll(draw_words(trainer, validation), validation)
    assert nll[1.0] <= min(nll.values()) + 1e-3, nll


def test_missing_models_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`eval_only` .* holds no saved model"):
        main([*SMALL, "--eval_only", str(tmp_path), "--output_dir", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        main([*SMALL, "--train_file", "none.txt", "--test_file", "none.txt", "--model_name_or_path", "x"])


def test_own_data_need_a_model() -> None:
    with pytest.raises(ValueError, match="`model_name_or_path` is needed for data of your own"):
        parse_arguments(["--train_file", "a", "--test_file", "b"])
    embedded, own = parse_arguments([]), parse_arguments(["--dataset_name", "a", "--model_name_or_path", "b"])
    assert (embedded[2].learning_rate, own[2].learning_rate) == (1e-3, 5e-5)
