"""What a Trainer user expects, with a converted model: logs, plain models, callbacks, precision, own losses."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import OptunaBackend
from transformers.trainer_utils import BestRun

import bayeformers
from bayeformers import kl_divergence, to_bayesian
from bayeformers.nn import variational_tensors
from bayeformers.training import BayesianTrainer
from tests.training import tiny


def logged(trainer: BayesianTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# -- logs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_logged_loss_is_nll_plus_weighted_kl(kl_weight: float, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, kl_weight=kl_weight, gradient_accumulation_steps=2, logging_steps=2, max_steps=4)
    trainer.train()
    assert len(logged(trainer, "nll")) == 2
    for entry in (entry for entry in trainer.state.log_history if "nll" in entry):
        # the Trainer sums the losses in float32
        assert entry["loss"] == pytest.approx(entry["nll"] + kl_weight * entry["kl"] / 20, rel=1e-5)
        assert entry["kl"] == pytest.approx(entry["log_variational_posterior"] - entry["log_prior"], rel=1e-9)


def test_logged_kl_is_that_of_the_step(tmp_path: Path) -> None:
    model = tiny.bayesian(delta=0.3, prior=bayeformers.NormalPrior(std=1.0))
    expected = [f(model).item() for f in (kl_divergence, bayeformers.log_prior, bayeformers.log_variational_posterior)]
    trainer = tiny.trainer(tmp_path, model, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    found = [entry[name] for name in ("kl", "log_prior", "log_variational_posterior")]
    assert found == pytest.approx(expected, rel=1e-5)


def test_scale_change_is_logged(tmp_path: Path) -> None:
    """Adam's first step moves rho by its learning rate; |d log sigma / d rho| = sigmoid(rho) / sigma is near 1."""
    model = tiny.bayesian(prior=bayeformers.NormalPrior(std=1.0))  # whose KL moves every scale
    trainer = tiny.trainer(tmp_path, model, max_steps=1, rho_learning_rate=0.1, lr_scheduler_type="constant")
    trainer.train()
    assert logged(trainer, "median_log_scale_change")[0] == pytest.approx(0.1, rel=0.1)


def test_kl_warms_up(tmp_path: Path) -> None:
    model = tiny.bayesian(prior=bayeformers.NormalPrior(std=1.0))
    trainer = tiny.trainer(tmp_path, model, max_steps=4, kl_warmup_ratio=0.5)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "nll" in entry]
    shares = [(entry["loss"] - entry["nll"]) / (entry["kl"] / 20) for entry in entries]
    assert shares == pytest.approx([0, 0.5, 1, 1], abs=1e-3)


def test_label_tokens_of_a_datasets_dataset_are_counted(tmp_path: Path) -> None:
    """Columns that the model does not take, here text, are removed before the collator sees them."""
    datasets = pytest.importorskip("datasets")
    rows = tiny.dataset("causal", 10).columns
    data = datasets.Dataset.from_dict({**{k: v.tolist() for k, v in rows.items()}, "text": ["words"] * 10})
    trainer = tiny.trainer(tmp_path, kind="causal", train_dataset=data)
    trainer.train()
    expected = int((rows["labels"][:, 1:] != -100).sum())
    assert trainer.model.config.bayesian["num_training_items"] == expected


def test_configuration_records_the_training(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, kl_weight=0.3)
    trainer.train()
    trainer.save_model()
    recorded = json.loads((tmp_path / "config.json").read_text())["bayesian"]
    assert (recorded["num_training_items"], recorded["kl_weight"]) == (20, 0.3)


def test_layers_that_never_run_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.plain()
    model.unused = nn.Linear(2, 2)
    trainer = tiny.trainer(tmp_path, to_bayesian(model))
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.train()
    warnings = [record for record in caplog.records if "unused" in record.message]
    assert len(warnings) == 1
    assert "exclude_modules" in warnings[0].message


# -- plain models ----------------------------------------------------------------------------------------------------


def test_plain_model_trains_on_its_own_loss_exactly_scaled(tmp_path: Path) -> None:
    """4 x 2 accumulation: the stock Trainer's loss is 4 times too big for BERT's classification head."""
    model, grads = tiny.plain(), []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    direct = tiny.plain()
    direct.eval()  # as the trained one: dropout off
    data = tiny.dataset("single", 8)
    direct(**data.columns).loss.backward()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tiny.trainer(
        tmp_path, model, train_dataset=data, callbacks=[Keep()], max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, max_grad_norm=0.0,
    ).train()  # fmt: skip
    for name, parameter in direct.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[0][name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_plain_model_is_said_to_be_a_point_estimate_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain(), eval_strategy="steps", eval_steps=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
        trainer.evaluate()
    for word in ("to_bayesian", "fit_laplace"):
        assert sum(word in record.message and "ordinary training" in record.message for record in caplog.records) == 1
        assert sum(word in record.message and "Evaluating" in record.message for record in caplog.records) == 1
    assert "kl" not in trainer.state.log_history[0]
    assert trainer.posterior is None


def test_label_smoothing_of_a_plain_model_is_the_users_choice(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, tiny.plain(), label_smoothing_factor=0.1).train()


def test_training_on_drops_a_fitted_posterior(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.trainer(tmp_path, tiny.plain())
    trainer.posterior = bayeformers.posteriors.PointPosterior(trainer.model)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.posterior is None
    assert any("dropped" in record.message for record in caplog.records)


def test_fitted_posterior_is_saved_beside_the_weights(tmp_path: Path) -> None:
    class Fitted(bayeformers.posteriors.PointPosterior):
        def save(self, directory: Any) -> None:
            (Path(directory) / "posterior.json").write_text("{}")

    trainer = tiny.trainer(tmp_path, tiny.plain())
    trainer.posterior = Fitted(trainer.model)
    trainer.save_model()
    assert {"model.safetensors", "posterior.json"} <= {path.name for path in tmp_path.iterdir()}


# -- the rest --------------------------------------------------------------------------------------------------------


def test_callbacks_stop_early(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, max_steps=10, learning_rate=0.0, rho_learning_rate=1e-12, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_nll",
        greater_is_better=False, callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 10


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str, tmp_path: Path) -> None:
    model = tiny.bayesian()
    trainer = tiny.trainer(tmp_path, model, **{precision: True})
    trainer.train()
    assert all(tensor.rho.dtype == tensor.loc.dtype == torch.float32 for tensor in variational_tensors(model))
    assert trainer.evaluate()["eval_loss"] < 2


def test_bf16_means_keep_float32_scales(tmp_path: Path) -> None:
    model = tiny.bayesian(prior=bayeformers.NormalPrior(std=1.0)).to(torch.bfloat16)
    before = {id(tensor.rho): tensor.rho.clone() for tensor in variational_tensors(model)}
    tiny.trainer(tmp_path, model, rho_learning_rate=1e-5).train()
    for tensor in variational_tensors(model):
        assert tensor.rho.dtype == torch.float32
        assert not torch.equal(tensor.rho, before[id(tensor.rho)])  # a step of 1e-5 is not lost


def test_activation_checkpointing_is_not_reentrant_by_default(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, activation_checkpointing=True)
    trainer.train()
    assert trainer.args.activation_checkpointing_kwargs == {"use_reentrant": False}


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("style", ["mean", "sum"])
def test_class_weights_by_compute_loss_func(converted: bool, style: str, tmp_path: Path) -> None:
    """A function that takes a mean and one that divides by `num_items_in_batch` give the same training."""
    weight = torch.tensor([1.0, 2.0, 0.5])

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        nll = F.cross_entropy(outputs["logits"], labels, weight=weight, reduction="none")
        return nll.mean() if style == "mean" else nll.sum() / num_items_in_batch

    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    trainer = tiny.trainer(
        tmp_path, tiny.bayesian() if converted else tiny.plain(**without_dropout),
        compute_loss_func=loss, train_dataset=tiny.dataset("single", 8), max_steps=1, per_device_train_batch_size=3,
        gradient_accumulation_steps=3, train_sampling_strategy="sequential",
    )  # fmt: skip
    if converted:
        with bayeformers.posterior_mean(trainer.model):
            trainer.train()
    else:
        trainer.train()
    data, model = tiny.dataset("single", 8).columns, tiny.plain().eval()
    logits = model(data["input_ids"], data["attention_mask"]).logits
    expected = F.cross_entropy(logits, data["labels"], weight=weight, reduction="none").mean()
    found = logged(trainer, "nll" if converted else "loss")[0]
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_hyperparameter_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own loop around a stand-in for the search library."""
    rates = [0.05, 0.001]

    def run(trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        objectives = []
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={"rho_learning_rate": rates[number]}))
            objectives.append(trainer.compute_objective(trainer.evaluate()))
            seen.append(trainer.optimizer.param_groups[-1]["initial_lr"])
        return BestRun("0", min(objectives), {"rho_learning_rate": rates[0]})

    seen: list[float] = []
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setattr(OptunaBackend, "run", lambda self, trainer, *args, **kwargs: run(trainer, *args, **kwargs))
    trainer = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian(), max_steps=1)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: trial.params,
        compute_objective=lambda metrics: metrics["eval_nll"],
        direction="minimize",
        n_trials=2,
        backend="optuna",
    )
    assert best.hyperparameters == {"rho_learning_rate": 0.05}
    assert seen == rates


def test_model_init_builds_a_fresh_posterior(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian())
    trainer.train()
    first = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, first[name]) for name, p in trainer.model.named_parameters())


def test_peft_adapter_trains_and_resumes_with_its_scales(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        adapters = ["lora_A.default", "lora_B.default"]
        return to_bayesian(peft.get_peft_model(tiny.plain(), config), 0.1, False, target_modules=adapters)

    whole = tiny.trainer(tmp_path, adapted(), save_strategy="steps", save_steps=1)
    whole.train()
    resumed = tiny.trainer(tmp_path, adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


def test_second_train_goes_on(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    groups = len(trainer.optimizer.param_groups)
    trainer.train()
    assert len(trainer.optimizer.param_groups) == groups


def test_an_unknown_head_trains_on_its_own_loss(tmp_path: Path) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            logits = self.head(self.embed(input_ids).mean(1))
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits} if loss is not None else {"logits": logits}

    trainer = tiny.trainer(tmp_path, to_bayesian(Custom(), delta=0.1, freeze=False))
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_nll", "eval_mutual_information"} <= set(metrics)
    assert metrics["eval_loss"] == metrics["eval_nll"]


def test_training_arguments_of_transformers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`args` must be a BayesianTrainingArguments, got TrainingArguments"):
        BayesianTrainer(model=tiny.bayesian(), args=TrainingArguments(str(tmp_path), report_to="none"))
