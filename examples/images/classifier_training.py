"""Fitting image classifiers: the point estimate, the ELBO around it, the curvature around it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, default_data_collator

from bayeformers import BayesianTrainer, calibrate_delta, to_bayesian
from examples.glue.training import phase_arguments, with_short_progress
from examples.held_out import RecordRows, save_rows
from examples.images.classifier_arguments import ClassifierArguments, ClassifierTrainingArguments
from examples.images.data import ImageData


def make_trainer(model: nn.Module, args: ClassifierTrainingArguments, data: ImageData) -> BayesianTrainer:
    """A trainer that reports on the validation images after each epoch and keeps the epoch of their least NLL."""
    trainer = BayesianTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,
        callbacks=[RecordRows(data.rows)],
    )
    return with_short_progress(trainer)


def save(trainer: BayesianTrainer, data: ImageData, folder: Path) -> None:
    """The model, its posterior if there is one, and the record of the images it was trained on."""
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        save_rows(data.rows, folder)


def fit_deterministic(
    model: PreTrainedModel, args: ClassifierTrainingArguments, data: ImageData, *, is_trained: bool = False
) -> BayesianTrainer:
    """Ordinary training, which ends early where the validation NLL does; a model that is trained stays as it is."""
    trainer = make_trainer(model, phase_arguments(args, "deterministic"), data)
    if not is_trained:
        trainer.add_callback(EarlyStoppingCallback(args.patience))
        trainer.train()
    return trainer


def fit_further(trained: BayesianTrainer, args: ClassifierTrainingArguments, data: ImageData) -> BayesianTrainer:
    """The point estimate trained on as the ELBO is, without noise and KL: what the additional epochs alone give."""
    trainer = make_trainer(copy.deepcopy(trained.model), _further(args, "trained_on"), data)
    trainer.train()
    return trainer


def best_delta(
    trained: BayesianTrainer, args: ClassifierTrainingArguments, data: ImageData, **conversion: Any
) -> float:
    """The delta of least validation NLL; every process searches on all of the same batches."""
    loader = DataLoader(data.validation, args.per_device_eval_batch_size, collate_fn=default_data_collator)
    return calibrate_delta(
        trained.model.to(args.device),
        [{name: value.to(args.device) for name, value in batch.items()} for batch in loader],
        num_samples=args.num_eval_samples,
        seed=args.eval_seed,
        progress=args.process_index == 0 and not args.disable_tqdm,
        **conversion,
    )


def converted(
    trained: BayesianTrainer,
    delta: float,
    name: str,
    model_args: ClassifierArguments,
    args: ClassifierTrainingArguments,
    data: ImageData,
    *,
    freeze: bool,
) -> BayesianTrainer:
    """A trainer around a Bayesian copy of the trained model, ready to train its ELBO."""
    model = to_bayesian(copy.deepcopy(trained.model), delta, freeze, **model_args.conversion)
    return make_trainer(model, _further(args, name), data)


def fit_laplace(
    trained: BayesianTrainer, model_args: ClassifierArguments, args: ClassifierTrainingArguments, data: ImageData
) -> BayesianTrainer:
    """A Gaussian around the trained weights, which stay as they are."""
    trainer = make_trainer(copy.deepcopy(trained.model), args, data)
    trainer.fit_laplace(validation_dataset=data.validation, **model_args.laplace)
    return trainer


def _further(args: ClassifierTrainingArguments, name: str) -> ClassifierTrainingArguments:
    changes = {"num_train_epochs": args.bayesian_epochs, "learning_rate": args.further_learning_rate}
    return phase_arguments(args, name, **changes)


def learning_curve(trainer: BayesianTrainer) -> list[float]:
    """Validation NLL after each epoch of the trainer's training."""
    return [float(logs["eval_nll"]) for logs in trainer.state.log_history if "eval_nll" in logs and "epoch" in logs]
