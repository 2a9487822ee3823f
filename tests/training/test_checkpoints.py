"""Saving, resuming in a fresh process, checkpoints that do not fit, and the best model at the end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bayeformers
from bayeformers.training import BayesianTrainer
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def logged(trainer: BayesianTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


RESUMABLE = {
    "max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "kl_warmup_ratio": 0.7
}  # fmt: skip
RESUME = f"""
import sys, torch
from tests.training import tiny
folder, checkpoint, out = sys.argv[1:]
trainer = tiny.trainer(folder, **{RESUMABLE})
trainer.train(resume_from_checkpoint=checkpoint)
torch.save((trainer.model.state_dict(), trainer.state.log_history), out)
"""


def test_resume_in_a_fresh_process_is_bit_exact(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path, **RESUMABLE)
    whole.train()
    arguments = [str(tmp_path / "again"), str(tmp_path / "checkpoint-2"), str(tmp_path / "again.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as this process computes: one thread
    done = subprocess.run(
        [sys.executable, "-c", RESUME, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    state, history = torch.load(tmp_path / "again.pt")
    assert state.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    own = ("median_log_scale_change", "train_runtime")  # since the start of the call
    logs = [
        [{k: v for k, v in entry.items() if k not in own} for entry in entries if entry["step"] > 2 and "nll" in entry]
        for entries in (whole.state.log_history, history)
    ]
    assert logs[0] == logs[1] != []


def saved(tmp_path: Path, **kwargs: Any) -> str:
    tiny.trainer(tmp_path, tiny.bayesian(**kwargs), max_steps=1, save_strategy="steps", save_steps=1).train()
    return str(tmp_path / "checkpoint-1")


def test_resume_refuses_an_unconverted_model(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    with pytest.raises(ValueError, match="holds the scales of .*not converted: call `to_bayesian"):
        tiny.trainer(tmp_path, tiny.plain()).train(resume_from_checkpoint=checkpoint)


def test_resume_refuses_another_conversion(tmp_path: Path) -> None:
    checkpoint, model = saved(tmp_path), tiny.bayesian(exclude_modules=["classifier"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"does not fit the model's conversion.*classifier.weight_rho"):
        tiny.trainer(tmp_path, model).train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_resume_refuses_another_prior(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    with pytest.raises(ValueError, match=r"trained with delta=0.2, the model was converted with delta=0.5"):
        tiny.trainer(tmp_path, tiny.bayesian(delta=0.5)).train(resume_from_checkpoint=checkpoint)


def test_resume_refuses_a_plain_checkpoint(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, tiny.plain(), max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="it lacks"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_tied_weights_resume(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    first = tiny.trainer(folder, kind="causal", max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    second = tiny.trainer(folder, kind="causal", max_steps=2)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert second.state.global_step == 2
    assert second.model.lm_head.weight_rho is second.model.transformer.wte.weight_rho


def test_saved_model_reloads_with_the_same_predictions(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = bayeformers.from_pretrained(tmp_path)
    again = tiny.trainer(tmp_path, loaded)
    data = tiny.dataset("single", 9, seed=5)
    assert (trainer.predict(data).predictions == again.predict(data).predictions).all()


@pytest.mark.parametrize("metric", ["loss", "eval_ece", "mutual_information", "eval_accuracy"])
def test_load_best_model_at_end(metric: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=metric == "eval_accuracy",
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    trainer.train()
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = logged(trainer, key)
    best = max(values) if metric == "eval_accuracy" else min(values)
    assert trainer.evaluate()[key] == pytest.approx(best, rel=1e-6)
