"""Fitting: the point estimate with early stopping, and posteriors around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bayeformers import BayesianTrainer, calibrate_delta, to_bayesian
from examples.glue.arguments import ExampleTrainingArguments, ModelArguments
from examples.glue.data import GlueData
from examples.glue.evaluation import training_rmse
from examples.glue.models import BAYESIAN, DETERMINISTIC, LAPLACE, LAPLACE_LAST_LAYER, LINEARIZED, load_saved
from examples.held_out import RecordRows, save_rows
from examples.training_flags import BestEpochArguments

PhaseArguments = TypeVar("PhaseArguments", bound=BestEpochArguments)

SHOWN = ("epoch", "loss", "nll", "kl", "eval_nll", "eval_ece", "eval_mutual_information")


class OneLineProgress(ProgressCallback):
    """The Trainer's progress bar, with a line per log that holds what one wants to watch."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        shown = {name: logs[name] for name in SHOWN if name in (logs or {})}
        if state.is_world_process_zero and self.training_bar is not None and len(shown) > 1:
            self.training_bar.write("  ".join(f"{name} {float(value):.4g}" for name, value in shown.items()))

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        if self.training_bar is None:  # a bar for each epoch's short validation would only flicker
            super().on_prediction_step(*args, **kwargs)


def make_trainer(
    model: PreTrainedModel | None,
    args: ExampleTrainingArguments,
    data: GlueData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_init: Callable[..., PreTrainedModel] | None = None,
) -> BayesianTrainer:
    """A trainer that reports on the validation set after each epoch, and stops and keeps the best epoch by its NLL.

    With a ``model_init`` in place of the model, each training makes its own.
    """
    trainer = BayesianTrainer(
        model=model,
        model_init=model_init,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[EarlyStoppingCallback(args.patience)],
    )
    trainer.add_callback(RecordRows(data.rows))
    return with_short_progress(trainer)


def save(trainer: BayesianTrainer, data: GlueData, folder: Path) -> None:
    """The model, its posterior if there is one, and the record of the rows it was trained on."""
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        save_rows(data.rows, folder)


def with_short_progress(trainer: BayesianTrainer) -> BayesianTrainer:
    """The same trainer; where it shows its progress, one line of it."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(OneLineProgress)
    return trainer


def phase_arguments(args: PhaseArguments, name: str, **changes: Any) -> PhaseArguments:
    """The arguments of one training: checkpoints under its own folder."""
    phase = copy.deepcopy(args)
    folder = str(Path(args.output_dir or ".") / "checkpoints" / name)
    for key, value in {"output_dir": folder, **changes}.items():
        setattr(phase, key, value)
    return phase


def fit_deterministic(
    model: PreTrainedModel, args: ExampleTrainingArguments, data: GlueData, tokenizer: PreTrainedTokenizerBase
) -> BayesianTrainer:
    """Ordinary training; with ``num_train_epochs`` 0 the model is taken as it is."""
    trainer = make_trainer(model, phase_arguments(args, DETERMINISTIC), data, tokenizer)
    if args.num_train_epochs > 0:
        trainer.train()
    return trainer


def best_delta(
    trainer: BayesianTrainer,
    model_args: ModelArguments,
    args: ExampleTrainingArguments,
    data: GlueData,
    *,
    method: Literal["sample", "glm"] = "sample",
) -> float:
    """The delta of least validation NLL for the trained model; every process searches on all of the same batches."""
    names = {*trainer.processing_class.model_input_names, "label"} & set(data.validation.column_names)
    validation = data.validation.select_columns(sorted(names))
    loader = DataLoader(validation, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    return calibrate_delta(
        trainer.model.to(args.device),
        [batch.to(args.device) for batch in loader],
        method=method,
        num_samples=args.num_eval_samples,
        seed=args.eval_seed,
        noise_std=training_rmse(trainer, data) if data.task.is_regression else None,
        progress=args.process_index == 0 and not args.disable_tqdm,
        **model_args.conversion,
    )


def fit_variational(
    trained: BayesianTrainer,
    model_args: ModelArguments,
    args: ExampleTrainingArguments,
    data: GlueData,
    tokenizer: PreTrainedTokenizerBase,
) -> BayesianTrainer:
    """`to_bayesian` around the trained weights, then the ELBO; with ``bayesian_epochs`` 0 the noise is the prior's."""
    delta = best_delta(trained, model_args, args, data) if model_args.delta is None else model_args.delta
    model = to_bayesian(trained.model, delta, **model_args.conversion)
    rate = args.bayesian_learning_rate if args.bayesian_learning_rate is not None else args.learning_rate / 10
    changes = {"num_train_epochs": args.bayesian_epochs, "learning_rate": rate}
    trainer = make_trainer(model, phase_arguments(args, BAYESIAN, **changes), data, tokenizer)
    if args.bayesian_epochs > 0:
        trainer.train()
    return trainer


def fit_linearized(
    trained: BayesianTrainer,
    model_args: ModelArguments,
    args: ExampleTrainingArguments,
    data: GlueData,
    tokenizer: PreTrainedTokenizerBase,
) -> BayesianTrainer:
    """Noise around the trained weights, of the delta that suits the linearised network best; nothing is trained."""
    delta = model_args.delta if model_args.method == "linearized" else None
    delta = best_delta(trained, model_args, args, data, method="glm") if delta is None else delta
    model = to_bayesian(copy.deepcopy(trained.model), delta, **model_args.conversion)
    trainer = make_trainer(model, phase_arguments(args, LINEARIZED, eval_method="glm"), data, tokenizer)
    if data.task.is_regression:
        trainer.noise_std()  # the residual, which is saved with the model
    return trainer


def fit_laplace(
    trained: BayesianTrainer,
    model_args: ModelArguments,
    args: ExampleTrainingArguments,
    data: GlueData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    subset: Literal["all", "last_layer"] = "all",
) -> BayesianTrainer:
    """A Gaussian around the trained weights, from the curvature of the training data; the weights stay as they are."""
    trainer = make_trainer(trained.model, args, data, tokenizer)
    trainer.fit_laplace(subset=subset, validation_dataset=data.validation, **model_args.laplace)
    return trainer


FITS: dict[str, Callable[..., BayesianTrainer]] = {
    LAPLACE_LAST_LAYER: partial(fit_laplace, subset="last_layer"),
    LAPLACE: fit_laplace,
    LINEARIZED: fit_linearized,
    BAYESIAN: fit_variational,
}
"""By folder: from the deterministic trainer to one with a posterior. The ELBO is last, for it changes the model."""


_ONE = {"variational": BAYESIAN, "linearized": LINEARIZED}


def posteriors_to_fit(model_args: ModelArguments) -> list[str]:
    """Those of `FITS` that ``--method`` asks for, in their order."""
    if model_args.method == "all":
        return list(FITS)
    if model_args.method in _ONE:
        return [_ONE[model_args.method]]
    return [LAPLACE if model_args.laplace_subset == "all" else LAPLACE_LAST_LAYER]


def saved_trainer(
    name: str, folder: Path, args: ExampleTrainingArguments, data: GlueData, tokenizer: PreTrainedTokenizerBase
) -> BayesianTrainer:
    """A trainer around a saved model, with the posterior that was saved beside it."""
    if name == LINEARIZED:
        args = copy.deepcopy(args)
        args.eval_method = "glm"
    return make_trainer(load_saved(name, folder), args, data, tokenizer)
