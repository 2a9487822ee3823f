"""Whose loss is trained: the order of the bases, overridden methods, and optimizers that pass rho by."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from bayeformers.nn import variational_tensors
from bayeformers.training import BayesianTrainer, BayesianTrainingArguments
from bayeformers.training.optimizer import separate_rho
from tests.training import tiny


class Weighted(Trainer):
    """transformers' recipe for class weights."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


class First(Weighted, BayesianTrainer):
    pass


class Last(BayesianTrainer, Weighted):
    pass


class Generating(BayesianTrainer, Seq2SeqTrainer):
    pass


class Override(BayesianTrainer):
    compute_loss = Weighted.compute_loss


class OwnStep(BayesianTrainer):
    def training_step(self, model: nn.Module, inputs: dict, *args: Any) -> Tensor:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


class OwnBatches(BayesianTrainer):
    get_batch_samples = Trainer.get_batch_samples


class Mixin:
    compute_loss = Weighted.compute_loss


class Mixed(Mixin, BayesianTrainer):
    pass


class Calling(BayesianTrainer):
    """An override that adds to our loss goes on working."""

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 100.0
        return (loss, outputs) if return_outputs else loss


def make(kind: type, folder: Path, model: nn.Module, **kwargs: Any) -> BayesianTrainer:
    return kind(
        model=model, args=tiny.arguments(folder, **kwargs), train_dataset=tiny.dataset(), eval_dataset=tiny.dataset()
    )


def trained(kind: type, folder: Path, **kwargs: Any) -> BayesianTrainer:
    trainer = make(kind, folder, tiny.bayesian(), **kwargs)
    trainer.train()
    return trainer


def test_another_trainer_first_is_refused_and_the_order_named(tmp_path: Path) -> None:
    for model in (tiny.bayesian(), tiny.plain()):
        with pytest.raises(TypeError, match=r"`Weighted` before `BayesianTrainer`.*class First\(BayesianTrainer, Weig"):
            make(First, tmp_path, model)
    with pytest.raises(TypeError, match=r"`prediction_step` would win.*class C\(BayesianTrainer, Seq2SeqTrainer\)"):
        make(type("C", (Seq2SeqTrainer, BayesianTrainer), {}), tmp_path, tiny.bayesian())


def test_the_order_that_is_named_trains_the_elbo(tmp_path: Path) -> None:
    first, second = (trained(kind, tmp_path) for kind in (BayesianTrainer, Last))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Override, "Override.compute_loss"),
        (Mixed, "Mixin.compute_loss"),
        (OwnStep, "OwnStep.training_step"),
        (OwnBatches, "OwnBatches.get_batch_samples"),
    ],
)
def test_an_override_without_our_loss_is_refused_before_anything_moves(kind: type, name: str, tmp_path: Path) -> None:
    trainer = make(kind, tmp_path, tiny.bayesian(), num_training_items=20)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"`{name}` does not call `super.*compute_loss_func"):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_an_override_that_calls_ours_goes_on_working(tmp_path: Path) -> None:
    first, second = (trained(kind, tmp_path, gradient_accumulation_steps=2) for kind in (BayesianTrainer, Calling))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert second.state.log_history[0]["loss"] == pytest.approx(first.state.log_history[0]["loss"] + 200)


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_override_on_a_plain_model_is_a_mean_over_the_step(accumulation: int, tmp_path: Path) -> None:
    """Loss and gradient are those of the whole step's mean, whatever the accumulation."""
    data, keep, model = tiny.dataset("single", 8), Keep(), without_dropout(tiny.plain())

    class Plain(BayesianTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = F.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    trainer = Plain(
        model=model, train_dataset=data, callbacks=[keep],
        args=tiny.arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=8 // accumulation, max_grad_norm=0.0,
            gradient_accumulation_steps=accumulation,
        ),
    )  # fmt: skip
    trainer.train()
    direct = without_dropout(tiny.plain())
    loss = direct(**data.columns).loss
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in direct.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(keep.grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_generating_trainer_evaluates_draws_and_returns_tokens(tmp_path: Path) -> None:
    @dataclass
    class Arguments(BayesianTrainingArguments, Seq2SeqTrainingArguments):
        pass

    args = Arguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=7, num_eval_samples=3, report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model, data = tiny.bayesian("seq2seq", delta=1.0), tiny.dataset("seq2seq", 4)
    found = Generating(model=model, args=args, train_dataset=data).predict(data)
    expected = tiny.trainer(tmp_path, model, "seq2seq").predict(data)
    assert found.metrics["test_nll"] == pytest.approx(expected.metrics["test_nll"], rel=1e-5)
    assert found.metrics["test_mutual_information"] > 0
    tokens = model.eval().generate(
        input_ids=data.columns["input_ids"], attention_mask=data.columns["attention_mask"], max_length=7
    )
    assert found.predictions[:, : tokens.shape[1]].tolist() == tokens.tolist()


# -- rho's step size -------------------------------------------------------------------------------------------------


def layerwise(model: nn.Module, lr: float) -> LayerWiseDummyOptimizer:
    single = {p: torch.optim.SGD([{"params": [p]}], lr=lr, weight_decay=0.1) for p in model.parameters()}
    return LayerWiseDummyOptimizer(optimizer_dict=single, lr=lr)


def test_a_layer_wise_optimizer_has_rhos_step_size() -> None:
    model = tiny.bayesian()
    optimizer = layerwise(model, 1e-3)
    separate_rho(optimizer, [tensor.rho for tensor in variational_tensors(model)], 0.05)
    rhos = {id(tensor.rho) for tensor in variational_tensors(model)}
    for parameter, single in optimizer.optimizer_dict.items():
        expected = (0.05, 0.0) if id(parameter) in rhos else (1e-3, 0.1)
        assert (single.param_groups[0]["lr"], single.param_groups[0]["weight_decay"]) == expected


def test_adafactor_takes_rhos_step_size_where_it_would_choose_its_own() -> None:
    from transformers.optimization import Adafactor

    model = tiny.bayesian()
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    rhos = [tensor.rho for tensor in variational_tensors(model)]
    separate_rho(optimizer, rhos, 0.05)
    group = next(g for g in optimizer.param_groups if any(p is rhos[0] for p in g["params"]))
    assert (group["lr"], group["relative_step"], group["scale_parameter"]) == (0.05, False, False)


class Composite(torch.optim.SGD):
    """Groups that are made anew at every look: none can be added."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [dict(group) for group in self._groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def add_param_group(self, group: dict[str, Any]) -> None:
        self._groups.append({**self.defaults, "params": list(group["params"])})


def test_an_optimizer_without_groups_for_rho_is_refused() -> None:
    model = tiny.bayesian()
    with pytest.raises(ValueError, match="Composite takes no group of its own.*`rho_learning_rate`=0.05"):
        separate_rho(
            Composite(model.parameters(), lr=1e-3), [tensor.rho for tensor in variational_tensors(model)], 0.05
        )


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_optimizers_of_one_step_size_are_refused(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`optim`=.*{optim}.*ignores `rho_learning_rate`"):
        tiny.trainer(tmp_path, optim=optim)


def test_an_optimizer_made_before_the_conversion_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.bayesian()
    means = [p for name, p in model.named_parameters() if not name.endswith("rho")]
    with caplog.at_level(logging.WARNING):
        tiny.trainer(tmp_path, model, optimizers=(torch.optim.SGD(means, lr=0.0), None)).train()
    assert sum("holds no scale of the model" in record.message for record in caplog.records) == 1


# -- functions that read the model's own loss ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda outputs, labels, num_items_in_batch=None: outputs.loss,
        lambda outputs, labels, num_items_in_batch=None: outputs["loss"],
        lambda outputs, labels, num_items_in_batch=None: 2 * outputs.loss,
        lambda outputs, labels, num_items_in_batch=None: outputs.loss.mean(),
        lambda outputs, labels, num_items_in_batch=None: 1.0,
    ],
)
def test_a_function_that_reads_a_loss_that_is_not_there(function: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`compute_loss_func` must return its loss as a tensor, got .*`labels`"):
        tiny.trainer(tmp_path, compute_loss_func=function).train()


@pytest.mark.parametrize("error", [KeyError("width"), TypeError("other"), RuntimeError("'loss'")])
def test_other_errors_of_a_function_are_its_own(error: Exception, tmp_path: Path) -> None:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    with pytest.raises(type(error)) as caught:
        tiny.trainer(tmp_path, compute_loss_func=function).train()
    assert caught.value is error


def test_labels_that_are_not_called_labels_stay_in_the_forward(tmp_path: Path) -> None:
    """As in the stock Trainer: a span's ends are not handed over, and the model computes its loss of them."""
    seen = []

    def function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        seen.append((labels, outputs.loss.item()))
        return outputs.loss

    trainer = tiny.trainer(tmp_path, kind="question", compute_loss_func=function, max_steps=1)
    trainer.train()
    assert seen[0][0] is None
    assert trainer.state.log_history[0]["nll"] == pytest.approx(seen[0][1], rel=1e-5)
