"""A head from its making to its end: replaced, trained, saved, read, resumed, in several processes, undone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import bayeformers
from bayeformers.heads import HeadPosterior, fit_covariance, head_loss, head_of, to_plain_head, to_sngp, to_vbll
from tests.heads import worker
from tests.heads.worker import KINDS, made, rows
from tests.training import tiny

ROOT = Path(__file__).parents[2]


def equal(one: Any, other: Any) -> bool:
    return torch.equal(one.logit_mean, other.logit_mean) and torch.equal(one.logit_covariance, other.logit_covariance)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Two processes that read the parent's folders and train on; see `worker`."""
    folder = tmp_path_factory.mktemp("heads")
    for kind in KINDS:
        worker.fitted(kind).save_pretrained(folder / kind)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "tests.heads.worker", str(folder)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_reload_is_bit_equal_in_a_fresh_process(kind: str, ranks: tuple[Path, list[Any]]) -> None:
    folder, found = ranks
    own = bayeformers.predict(worker.fitted(kind), rows())
    loaded = bayeformers.from_pretrained(folder / kind)
    assert isinstance(loaded.posterior, HeadPosterior) and type(loaded) is hf.BertForSequenceClassification
    assert equal(bayeformers.predict(loaded, rows()), own)
    assert all(equal(rank[kind], own) for rank in found)
    sampled = [
        bayeformers.predict(m, rows(), method="sample", num_samples=3).log_probs for m in (loaded, worker.fitted(kind))
    ]
    assert torch.equal(*sampled)


@pytest.mark.slow
def test_two_processes(ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """The precision is that of one process, the training's gradient that of all rows, and both have the same."""
    first, second = ranks[1]
    alone = made("sngp")
    fit_covariance(alone, worker.batches())
    assert torch.equal(first["precision"], second["precision"])
    torch.testing.assert_close(first["precision"], head_of(alone).precision, rtol=1e-6, atol=1e-6)
    assert first["count"] == second["count"] == worker.COUNT
    for kind in KINDS:
        trainer = worker.trainer(tmp_path, kind, batch=4, optim="sgd")
        trainer.train()
        own = trainer.model.state_dict()
        for name, value in first[f"{kind} trained"].items():
            assert torch.equal(value, second[f"{kind} trained"][name])
            torch.testing.assert_close(value, own[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_on_its_objective(kind: str, tmp_path: Path) -> None:
    """Mean nll + penalty / N, whatever the accumulation: the loss and gradient of `head_loss` on the whole batch."""
    found = {}
    for size, steps in ((8, 1), (2, 4)):
        trainer = worker.trainer(
            tmp_path, kind, batch=size, gradient_accumulation_steps=steps, max_steps=1, weight_decay=0.5
        )
        start = copy.deepcopy(trainer.model)
        seen: list[Any] = []
        step = trainer.training_step

        def noted(model: nn.Module, inputs: dict[str, Any], *rest: Any, step: Any = step, seen: Any = seen) -> Any:
            seen.append(inputs)
            return step(model, inputs, *rest)

        trainer.training_step = noted  # type: ignore[method-assign]
        trainer.train()
        whole = {name: torch.cat([batch[name] for batch in seen]) for name in seen[0]}
        expected = head_loss(start.train(), whole, len(trainer.train_dataset))  # type: ignore[arg-type]
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert log["nll"] + log["penalty"] / worker.COUNT == pytest.approx(expected.item(), rel=1e-5)
        found[size] = log["grad_norm"]
    assert found[8] == pytest.approx(found[2], rel=1e-4)
    groups = trainer.optimizer.param_groups  # type: ignore[union-attr]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed and not decayed & {id(p) for p in head_of(trainer.model).parameters()}
    scales = head_of(trainer.model).scale_parameters()
    assert all(any(p is s for p in groups[-1]["params"]) for s in scales)
    assert not scales or groups[-1]["initial_lr"] == trainer.args.rho_learning_rate


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_equal(kind: str, tmp_path: Path) -> None:
    whole = worker.trainer(tmp_path / "whole", kind, max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = worker.trainer(tmp_path / "resumed", kind, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    own = whole.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in resumed.model.state_dict().items())
    if kind == "sngp":
        layer: Any = head_of(whole.model)
        assert layer.is_fitted and int(layer.num_fitted) == worker.COUNT
        norm = torch.linalg.matrix_norm(whole.model.bert.pooler.dense.weight.detach(), 2)  # type: ignore[union-attr]
        assert norm <= 0.95 * (1 + 1e-3)


@pytest.mark.parametrize("problem", ["multi", "regression", "token"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_problems(kind: str, problem: str, tmp_path: Path) -> None:
    """Train, evaluate, save and read; columns are those of the head's predictive."""
    model = (to_vbll if kind == "vbll" else to_sngp)(tiny.plain(problem), **worker.OPTIONS[kind])  # type: ignore[operator]
    trainer = tiny.trainer(tmp_path, model, problem, max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_nll"] == metrics["eval_loss"] and metrics["eval_nll"] < 5
    wanted = "eval_epistemic_variance" if problem == "regression" else "eval_mutual_information"
    assert metrics[wanted] > 0
    trainer.save_model(str(tmp_path))
    batch = {name: value for name, value in tiny.dataset(problem, 3).columns.items() if name != "labels"}
    one, other = (bayeformers.predict(m, batch) for m in (model.eval(), bayeformers.from_pretrained(tmp_path)))
    assert equal(one, other)
    if problem == "regression":
        noise = float(head_of(model).noise_variance.detach())
        torch.testing.assert_close(one.aleatoric_variance, torch.full((3,), noise), rtol=1e-5, atol=0)
    sampled = bayeformers.predict(model, batch, method="sample", num_samples=300)
    exact = bayeformers.predict(model, batch)
    if problem == "regression":  # of 300 draws a mean is off by less than 5 of its standard errors
        error = (sampled.mean - exact.mean).abs() / (exact.epistemic_variance / 300).sqrt()
        assert error.max() < 5
    else:
        torch.testing.assert_close(sampled.probs, exact.probs, atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_undone(kind: str) -> None:
    """The former layer, or VBLL's mean, and what trained before; VBLL's logits never changed."""
    model = tiny.plain("single").eval()
    model.bert.embeddings.requires_grad_(False)
    before, keys = model(**rows()).logits, list(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    made(kind, model, freeze=True)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"classifier"}
    logits = model(**rows()).logits
    assert torch.equal(logits, before if kind == "vbll" else torch.zeros_like(before))
    assert to_plain_head(model) is model
    assert type(model.classifier) is nn.Linear and list(model.state_dict()) == keys
    assert torch.equal(model(**rows()).logits, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not hasattr(model.config, "bayesian_head") and not hasattr(model, "posterior")
    made(kind, model)  # and again


def test_plainly_loaded(tmp_path: Path) -> None:
    """transformers alone reads VBLL's mean; saved again, the folder is that of a plain model."""
    model = worker.fitted("vbll")
    model.save_pretrained(tmp_path)
    plain = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(plain.classifier.weight, model.classifier.weight)
    plain.save_pretrained(tmp_path / "plain")
    assert not hasattr(hf.AutoConfig.from_pretrained(tmp_path / "plain"), "bayesian_head")
    assert plain.config.bayesian_head["kind"] == "vbll"
    worker.fitted("sngp").save_pretrained(tmp_path / "sngp")
    loaded = bayeformers.from_pretrained(tmp_path / "sngp")
    with pytest.raises(ValueError, match="the former layer is not there"):
        to_plain_head(loaded)
    to_plain_head(bayeformers.from_pretrained(tmp_path))  # whose mean is there


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_encoder(kind: str, tmp_path: Path) -> None:
    """The head's state and its outputs are float32, however the model is cast, saved and read."""
    model = made(kind, tiny.plain("single").to(torch.bfloat16)).to(torch.bfloat16).eval()
    tensors = {t.dtype for t in head_of(model).state_dict().values() if t.is_floating_point()}
    assert tensors == {torch.float32} and model.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert model(**rows()).logits.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = bayeformers.from_pretrained(tmp_path)
    assert loaded.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert {t.dtype for t in head_of(loaded).state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert equal(bayeformers.predict(loaded, rows()), bayeformers.predict(model, rows()))


def test_last_token_of_a_decoder(tmp_path: Path) -> None:
    """GPT-2 scores every token and keeps the last one's logits: features take the same way."""
    config = hf.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    model = to_vbll(hf.GPT2ForSequenceClassification(config).eval(), covariance="dense")
    predictive = bayeformers.predict(model, rows())
    with torch.no_grad():
        torch.testing.assert_close(predictive.logit_mean, model(**rows()).logits)
        hidden = model.transformer(**rows()).last_hidden_state
        last = hidden[torch.arange(len(hidden)), rows()["attention_mask"].sum(1) - 1]
        variance = head_of(model).variance(last)
    torch.testing.assert_close(predictive.logit_covariance, variance.diag_embed())


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(kind: str, tmp_path: Path) -> None:
    """LoRA around the encoder; PEFT trains and saves its own copy of the head."""
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"], r=2)
        return peft.get_peft_model(made(kind), lora)

    model = adapted()
    layer = head_of(model)
    assert layer is model.base_model.model.classifier.modules_to_save["default"]
    trainer = tiny.trainer(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2)
    start = layer.weight.detach().clone()
    trainer.train()
    assert not torch.equal(layer.weight, start) and trainer.evaluate()["eval_mutual_information"] > 0
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(made(kind), tmp_path / "adapter").eval()
    assert equal(HeadPosterior(loaded).predict(rows()), HeadPosterior(model).predict(rows()))


def test_best_model_with_its_covariance(tmp_path: Path) -> None:
    """Evaluations inside training use the mean; the covariance is that of the weights that are kept."""
    trainer = worker.trainer(
        tmp_path, "sngp", max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="nll",
    )  # fmt: skip
    trainer.train()
    again = copy.deepcopy(trainer.model)
    fit_covariance(again, worker.batches())
    torch.testing.assert_close(head_of(again).precision, head_of(trainer.model).precision)


def test_gradient_of_the_encoder() -> None:
    """The features are part of the graph."""
    model = made("vbll").train()
    batch: dict[str, Tensor] = {**rows(), "labels": torch.tensor([0, 1, 2])}
    head_loss(model, batch, 100).backward()
    assert all(p.grad is not None for p in model.parameters())
