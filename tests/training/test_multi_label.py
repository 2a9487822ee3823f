"""Multi-label heads: the labels decide as in transformers, for good; metrics see what a sigmoid understands."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

import bayeformers
from bayeformers import to_bayesian
from bayeformers.likelihoods import record_problem_type
from tests.training import tiny


def undeclared() -> nn.Module:
    """The multi-label model of the other tests, whose configuration does not say so."""
    model = tiny.plain("multi")
    model.config.problem_type = None
    return model


def unlabelled(data: tiny.Rows) -> tiny.Rows:
    return tiny.Rows(**{name: value for name, value in data.columns.items() if name != "labels"})


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_the_first_labels_decide_as_in_transformers(kind: str, tmp_path: Path) -> None:
    stock, ours = tiny.plain(kind), tiny.plain(kind)
    stock.config.problem_type = ours.config.problem_type = None
    stock(**tiny.dataset(kind, 4).columns)
    tiny.trainer(tmp_path, to_bayesian(ours), kind).train()
    assert ours.config.problem_type == stock.config.problem_type is not None


def test_training_prediction_and_checkpoint_agree(tmp_path: Path) -> None:
    data = tiny.dataset("multi", 9, seed=5)
    trainers = [
        tiny.trainer(tmp_path / name, to_bayesian(model, delta=0.5), "multi")
        for name, model in (("undeclared", undeclared()), ("declared", tiny.plain("multi")))
    ]
    outputs = []
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
        outputs.append(trainer.predict(unlabelled(data)))
        trainer.save_model()
    np.testing.assert_allclose(outputs[0].predictions, outputs[1].predictions, atol=1e-5)
    assert outputs[0].uncertainty["mutual_information"].shape == (9, 3)  # a Bernoulli per label
    saved = json.loads((tmp_path / "undeclared" / "config.json").read_text())
    assert saved["problem_type"] == "multi_label_classification"
    loaded = bayeformers.from_pretrained(tmp_path / "undeclared")
    again = bayeformers.predict(loaded, unlabelled(data).columns, num_samples=3)
    assert again.log_probs.shape == (3, 9, 3, 2)


def test_an_evaluation_decides_too(tmp_path: Path) -> None:
    data = tiny.dataset("multi", 9, seed=5)
    trainer = tiny.trainer(tmp_path, to_bayesian(undeclared(), delta=0.5), "multi", eval_dataset=data)
    trainer.evaluate()
    assert trainer.predict(unlabelled(data)).uncertainty["mutual_information"].shape == (9, 3)


def test_labels_of_a_plain_model_are_its_own(tmp_path: Path) -> None:
    model = undeclared()
    tiny.trainer(tmp_path, model, "multi").train()
    assert model.config.problem_type == "multi_label_classification"


def test_what_is_declared_stays_and_other_heads_have_none() -> None:
    declared, tokens = tiny.plain("single"), tiny.plain("token")
    declared.config.problem_type = "single_label_classification"
    for model in (declared, tokens):
        before = model.config.problem_type
        assert not record_problem_type(model, torch.zeros(2, 3))
        assert model.config.problem_type == before
    masks = undeclared()
    assert record_problem_type(masks, torch.zeros(2, 3, dtype=torch.bool))
    assert masks.config.problem_type == "multi_label_classification"


def test_a_loss_of_ones_own_decides_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the stock Trainer; floating-point labels may be soft classes there."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs["logits"], labels)

    model = to_bayesian(undeclared())
    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, model, "multi", compute_loss_func=loss).train()
    assert model.config.problem_type is None
    assert sum("`config.problem_type` is not set" in record.message for record in caplog.records) == 1


# -- what metrics see ------------------------------------------------------------------------------------------------


def f1(prediction: EvalPrediction) -> dict[str, float]:
    """The usual recipe: sigmoid > 1/2."""
    chosen = 1 / (1 + np.exp(-prediction.predictions)) > 0.5
    right = (chosen * prediction.label_ids).sum()
    return {"f1": float(2 * right / (chosen.sum() + prediction.label_ids.sum()))}


def labelled_by(model: nn.Module, data: tiny.Rows) -> tiny.Rows:
    with torch.no_grad():
        logits = model.eval()(**unlabelled(data).columns).logits
    return tiny.Rows(**unlabelled(data).columns, labels=(logits > 0).float())


def test_the_usual_recipe_scores_as_with_the_stock_trainer(tmp_path: Path) -> None:
    model = tiny.plain("multi")
    data = labelled_by(model, tiny.dataset("multi", 9, seed=5))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    stock = Trainer(model, args, eval_dataset=data, compute_metrics=f1)
    ours = tiny.trainer(tmp_path, tiny.plain("multi"), "multi", eval_dataset=data, compute_metrics=f1)
    assert ours.evaluate()["eval_f1"] == pytest.approx(stock.evaluate()["eval_f1"]) == 1.0
    np.testing.assert_allclose(ours.predict(data).predictions, stock.predict(data).predictions, atol=1e-5)
    drawn = tiny.trainer(tmp_path, tiny.bayesian("multi", delta=0.05), "multi", eval_dataset=data, compute_metrics=f1)
    assert drawn.evaluate()["eval_f1"] > 0.5


@pytest.mark.parametrize("path", ["whole", "batches", "preprocess", "list", "linearized"])
def test_every_way_out_hands_over_log_odds(path: str, tmp_path: Path) -> None:
    data, model, seen = tiny.dataset("multi", 9, seed=5), tiny.bayesian("multi", delta=0.5), []

    def metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"one": 1.0}

    kwargs: dict[str, Any] = {
        "whole": {},
        "batches": {"batch_eval_metrics": True},
        "preprocess": {"preprocess_logits_for_metrics": lambda logits, labels: logits.sigmoid().logit()},
        "list": {"eval_do_concat_batches": False},
        "linearized": {"eval_method": "glm"},
    }[path]
    trainer = tiny.trainer(tmp_path, model, "multi", eval_dataset=data, compute_metrics=metrics, **kwargs)
    trainer.evaluate()
    found = np.concatenate([np.concatenate(part) if isinstance(part, list) else part for part in seen])
    predictive = trainer.posterior.predict(
        unlabelled(data).columns, num_samples=3, method="glm" if path == "linearized" else "sample"
    )
    log_probs = predictive.mean_log_probs
    np.testing.assert_allclose(found, log_probs[..., 1] - log_probs[..., 0], atol=1e-4)


def test_pipelines_of_the_saved_model_use_a_sigmoid(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, to_bayesian(undeclared()), "multi")
    trainer.train()
    trainer.save_model()
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert config.problem_type == "multi_label_classification"
