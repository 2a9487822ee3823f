"""Pipelines that write: from folders, and over posteriors of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import bayeformers
from bayeformers import BayesianTrainer, BayesianTrainingArguments, generate, to_bayesian
from bayeformers.posteriors import EnsemblePosterior
from tests.generation import models
from tests.pipelines.writers import GREEDY, TEXTS, ids_of, writer
from tests.training.trainers import arguments, llama, tokenizer


def from_folder(folder: Path) -> Any:
    return bayeformers.pipeline("text-generation", str(folder), device="cpu", num_samples=4, **GREEDY)


def test_a_converted_models_folder(tmp_path: Path) -> None:
    """From its name alone, the tokenizer included."""
    model = to_bayesian(llama(), delta=0.5).eval()
    expected = writer(model)(TEXTS)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert from_folder(tmp_path)(TEXTS) == expected


def test_an_adapters_folder(tmp_path: Path) -> None:
    """Beside the folder of its base, which has the tokenizer."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = to_bayesian(peft.get_peft_model(base, settings), delta=0.9, target_modules=models.LORA).eval()
    expected = writer(model)(TEXTS)
    model.save_pretrained(tmp_path / "adapter")
    assert from_folder(tmp_path / "adapter")(TEXTS) == expected
    assert expected[0][0]["uncertainty"]["epistemic"] > 0.0


def test_a_folder_that_is_not_bayesian(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for (found,), (wanted,) in zip(from_folder(tmp_path)(TEXTS), writer(llama())(TEXTS), strict=True):
        assert found["generated_text"] == wanted["generated_text"] and found["uncertainty"]["epistemic"] == 0.0
        assert found["sequence_score"] == pytest.approx(wanted["sequence_score"], abs=1e-5)


def of_members(folder: Path) -> Any:
    return EnsemblePosterior(llama(), [llama(seed=seed) for seed in range(3)])


def of_a_fit(folder: Path) -> Any:
    ids = [ids_of(text)["input_ids"][0] for text in ("w1 w2 w3 w4", "w7 w8 w2 w9")]
    trainer = BayesianTrainer(
        model=llama(), args=arguments(BayesianTrainingArguments, folder),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    )  # fmt: skip
    return trainer.fit_laplace(target_modules=["o_proj"], prior_precision=1.0)


@pytest.mark.parametrize("make", [of_members, of_a_fit])
def test_posteriors_beside_a_model(make: Any, tmp_path: Path) -> None:
    """What `generate` says of the same networks, asked by the posterior and by its model."""
    posterior = make(tmp_path)
    wanted = generate(posterior, ids_of(TEXTS[0]), num_samples=3, mixing="average", **GREEDY)
    epistemic = float((wanted.epistemic * wanted.mask).sum() / wanted.mask.sum())
    posterior.model.posterior = posterior
    for given in (posterior, posterior.model):
        (record,) = writer(given, num_samples=3)(TEXTS[0])
        assert record["uncertainty"]["epistemic"] == pytest.approx(epistemic, abs=1e-6) and epistemic > 1e-4
        assert record["sequence_score"] == pytest.approx(float(wanted.sequence_log_prob), abs=1e-5)
