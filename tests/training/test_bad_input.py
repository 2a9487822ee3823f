"""Wrong input: one clear error that names the argument, before anything changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from bayeformers.training import checks
from tests.training import tiny


class Stream(IterableDataset):
    """No length."""

    def __iter__(self) -> Any:
        yield from (tiny.dataset("single", 8)[i] for i in range(8))


def relabelled(value: Any, kind: str = "single") -> tiny.Rows:
    data = tiny.dataset(kind, 8)
    data.columns["labels"] = data.columns["labels"].clone()
    data.columns["labels"][3] = value
    return data


def test_empty_train_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        tiny.trainer(tmp_path, train_dataset=tiny.dataset("single", 0))


@pytest.mark.parametrize("as_dict", [True, False])
def test_empty_eval_dataset(as_dict: bool, tmp_path: Path) -> None:
    empty = tiny.dataset("single", 0)
    with pytest.raises(ValueError, match="`eval_dataset.* is empty"):
        tiny.trainer(tmp_path, eval_dataset={"a": empty} if as_dict else empty)
    with pytest.raises(ValueError, match="`eval_dataset.* is empty"):
        tiny.trainer(tmp_path).evaluate({"a": empty} if as_dict else empty)


def test_empty_test_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`test_dataset` is empty"):
        tiny.trainer(tmp_path).predict(tiny.dataset("single", 0))


def test_iterable_dataset_needs_n(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, train_dataset=Stream())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="`num_training_items` must be given: `train_dataset` is an IterableDataset"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_iterable_dataset_with_n_trains(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, train_dataset=Stream(), num_training_items=8)
    trainer.train()
    assert trainer.model.config.bayesian["num_training_items"] == 8


@pytest.mark.parametrize("value", [3, -1, 100])
def test_labels_out_of_range_in_training(value: int, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, train_dataset=relabelled(value), train_sampling_strategy="sequential")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=rf"`labels` must lie in \[0, 3\).*got {value}"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_labels_out_of_range_in_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`labels` must lie in \[0, 3\).*got 3"):
        tiny.trainer(tmp_path).evaluate(relabelled(3))


def test_regression_labels_that_are_not_finite(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, kind="regression", train_dataset=relabelled(float("nan"), "regression"), noise_std=1.0, max_steps=2
    )
    with pytest.raises(ValueError, match="`labels` of a regression must be finite"):
        trainer.train()


def test_training_without_labels(tmp_path: Path) -> None:
    bare = tiny.Rows(**tiny.tokens(8))
    with pytest.raises(ValueError, match="`labels` must be a tensor in every training batch"):
        tiny.trainer(tmp_path, train_dataset=bare).train()


def test_no_label_at_all(tmp_path: Path) -> None:
    data = tiny.dataset("causal", 8)
    data.columns["labels"] = torch.full_like(data.columns["labels"], -100)
    with pytest.raises(ValueError, match="`train_dataset` has no label to learn from"):
        tiny.trainer(tmp_path, kind="causal", train_dataset=data).train()


def test_label_smoothing(tmp_path: Path) -> None:
    model = tiny.bayesian()
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0 .*got 0.1"):
        tiny.trainer(tmp_path, model, label_smoothing_factor=0.1)


def test_label_smoothing_with_model_init(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, model_init=lambda: tiny.bayesian(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="`label_smoothing_factor` must be 0"):
        trainer.train()


@pytest.mark.parametrize("converted", [True, False])
def test_data_parallel_names_the_launch_command(converted: bool, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    args._n_gpu = 2
    from bayeformers.training import BayesianTrainer

    with pytest.raises(ValueError, match="accelerate launch --num_processes 2 your_script.py"):
        BayesianTrainer(model=tiny.bayesian() if converted else tiny.plain(), args=args)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_engines(engine: str, tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    setattr(args, engine, True)
    args.fsdp_config = {"version": 1}
    with pytest.raises(ValueError, match=f"`{engine}`.* shards parameters"):
        checks.check_converted(args)


def test_fsdp2_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tiny.arguments(tmp_path)
    args.fsdp, args.fsdp_config = True, {"version": 2}
    checks.check_converted(args)
    args.fsdp = False
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    checks.check_converted(args)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharded_engines_of_the_launcher(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tiny.arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=f"`{engine.lower()}`.* shards parameters"):
        checks.check_converted(args)


def test_reentrant_checkpointing_across_processes() -> None:
    args = SimpleNamespace(
        label_smoothing_factor=0, fsdp=None, deepspeed=None, activation_checkpointing=True, world_size=2,
        activation_checkpointing_kwargs={"use_reentrant": True}, ddp_static_graph=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`activation_checkpointing_kwargs` has use_reentrant=True"):
        checks.check_converted(args)


def test_residual_noise_without_training_data(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, kind="regression", train_dataset=None)
    with pytest.raises(ValueError, match='`noise_std`="residual" needs a `train_dataset`'):
        trainer.evaluate()


def test_residual_of_zero(tmp_path: Path) -> None:
    data = tiny.dataset("regression", 8)
    trainer = tiny.trainer(tmp_path, kind="regression", train_dataset=data)
    with torch.no_grad():
        trainer.model.classifier.weight.zero_()
    data.columns["labels"] = torch.zeros(8)
    with pytest.raises(ValueError, match='`noise_std`="residual" is 0.0'):
        trainer.store_residual()


def test_unknown_problem_type(tmp_path: Path) -> None:
    model = tiny.bayesian()
    model.config.problem_type = "regressions"
    with pytest.raises(ValueError, match="`config.problem_type` must be one of"):
        tiny.trainer(tmp_path, model).train()


def test_loss_outside_training_needs_n(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, train_dataset=None)
    with pytest.raises(ValueError, match="`num_training_items` must be given"):
        trainer.compute_loss(trainer.model.train(), tiny.dataset("single", 4).columns)


@pytest.mark.parametrize("convert", [True, False])
def test_tokens_of_one_class(convert: bool, tmp_path: Path) -> None:
    """Before the first step: their loss is 0 whatever is learned, and evaluation would end in an error."""
    model = (tiny.bayesian if convert else tiny.plain)("token", num_labels=1)
    data = tiny.dataset("token", 8, num_labels=1)
    trainer = tiny.trainer(tmp_path, model, "token", train_dataset=data, eval_dataset=data)
    with pytest.raises(ValueError, match="`config.num_labels` of a token classifier must be at least 2, got 1: a soft"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match=r"`logits` have the shape \(4, 6, 1\): a softmax over one class is 1"):
        trainer.evaluate()


def test_several_test_datasets(tmp_path: Path) -> None:
    trainer, data = tiny.trainer(tmp_path), tiny.dataset("single", 5)
    with pytest.raises(TypeError, match=r"`test_dataset` must be one dataset, got a mapping with the names \['a'\]"):
        trainer.predict({"a": data})
    assert trainer.predict({i: data[i] for i in range(5)}).predictions.shape == (5, 3)  # torch's own loader takes it
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate({"a": data, "b": data}).keys()


def test_rows_that_are_read_only_once(tmp_path: Path) -> None:
    data = tiny.dataset("single", 5)
    for name, use in (
        ("test_dataset", lambda rows: tiny.trainer(tmp_path).predict(rows)),
        ("eval_dataset", lambda rows: tiny.trainer(tmp_path).evaluate(rows)),
        ("eval_dataset", lambda rows: tiny.trainer(tmp_path, eval_dataset=rows)),
        ("train_dataset", lambda rows: tiny.trainer(tmp_path, train_dataset=rows)),
    ):
        with pytest.raises(TypeError, match=f"`{name}` must be a dataset, or a list of rows, got a generator"):
            use(row for row in data)
    assert tiny.trainer(tmp_path).predict([data[i] for i in range(5)]).predictions.shape == (5, 3)
    assert tiny.trainer(tmp_path).predict(Stream()).predictions.shape == (8, 3)
