"""The trainings of an experiment: a deterministic one with early stopping, and posteriors around its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..conversion import to_bayesian
from ..delta import calibrate_delta
from ..training import BayesianTrainer
from .arguments import BestEpochArguments, ConversionArguments
from .evaluation import is_regression, training_rmse
from .rows import FILE, RecordRows, TrainingRows
from .saved import BAYESIAN, DETERMINISTIC, LINEARIZED, load_saved

SHOWN = ("epoch", "loss", "nll", "kl", "eval_nll", "eval_ece", "eval_mutual_information")


class OneLineProgress(ProgressCallback):
    """The Trainer's progress bar, with a line per log that holds what one wants to watch."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the line above the bar.

        Args:
            args: of the training.
            state: how far the training is, and in which process.
            control: what the training does next; it stays as it is.
            logs: numbers by name, of which `SHOWN` are written.
            **kwargs: what else a callback is given, such as the model.
        """
        shown = {name: logs[name] for name in SHOWN if name in (logs or {})}
        if state.is_world_process_zero and self.training_bar is not None and len(shown) > 1:
            self.training_bar.write("  ".join(f"{name} {float(value):.4g}" for name, value in shown.items()))

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show no bar within a training: one for each epoch's short validation would only flicker."""
        if self.training_bar is None:
            super().on_prediction_step(*args, **kwargs)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Experiment:
    """What all trainings of a run share, and the trainings; models and checkpoints go to the output folder by name.

    Attributes:
        args: the flags.
        train: rows to train on.
        validation: rows that choose epochs, delta and prior precision.
        collator: makes batches of rows; None for the Trainer's own.
        tokenizer: saved beside every model; None without one.
        rows: the record of the training rows, saved beside every model; None where they are not known.
    """

    args: BestEpochArguments
    train: Any
    validation: Any
    collator: Callable[[list[Any]], Any] | None = None
    tokenizer: Any = None
    rows: TrainingRows | None = None

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir or ".")

    def trainer(
        self,
        model: nn.Module | None,
        name: str,
        *,
        model_init: Callable[..., PreTrainedModel] | None = None,
        stop_early: bool = True,
        **changes: Any,
    ) -> BayesianTrainer:
        """Return a trainer that reports on the validation rows after each epoch and keeps that of their least NLL.

        Args:
            model: to train; None with a ``model_init``.
            name: of the phase, and of its folder of checkpoints.
            model_init: makes the model of each training, as of transformers' Trainer.
            stop_early: whether ``--patience`` epochs without a better NLL end the training.
            changes: flags that differ in this phase.
        """
        args = copy.deepcopy(self.args)
        for key, value in {"output_dir": str(self.folder / "checkpoints" / name), **changes}.items():
            setattr(args, key, value)
        trainer = BayesianTrainer(
            model=model,
            model_init=model_init,
            args=args,
            train_dataset=self.train,
            eval_dataset=self.validation,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            callbacks=[*([EarlyStoppingCallback(args.patience)] if stop_early else []), RecordRows(self.rows)],
        )
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(OneLineProgress)
        return trainer

    def fit(self, model: nn.Module, name: str = DETERMINISTIC, **options: Any) -> BayesianTrainer:
        """Train one phase; with ``num_train_epochs`` 0 the model is taken as it is. Options: those of `trainer`."""
        trainer = self.trainer(model, name, **options)
        if trainer.args.num_train_epochs > 0:
            trainer.train()
        return trainer

    def save(self, trainer: BayesianTrainer, name: str) -> None:
        """The model, its posterior if there is one, and the record of the rows it was trained on."""
        trainer.save_model(str(self.folder / name))
        if trainer.is_world_process_zero():
            (self.folder / name / FILE).unlink(missing_ok=True)  # of an earlier run
            if self.rows is not None:
                self.rows.save(self.folder / name)

    def load(self, name: str, folder: str | Path, auto_class: Any) -> BayesianTrainer:
        """Return a trainer around a saved model, with the posterior that was saved beside it; see `load_saved`.

        Args:
            name: of the phase that saved the model.
            folder: the saved model's.
            auto_class: transformers' class of deterministic models.
        """
        changes: dict[str, Any] = {"eval_method": "glm"} if name == LINEARIZED else {}
        return self.trainer(load_saved(name, folder, auto_class), name, **changes)

    def best_delta(
        self,
        trained: BayesianTrainer,
        conversion: dict[str, Any],
        *,
        method: Literal["sample", "glm"] = "sample",
        label_columns: Sequence[str] = (),
        **options: Any,
    ) -> float:
        """Return the delta of least validation NLL for a trained model; all processes search on all the same batches.

        Args:
            trained: whose model it is.
            conversion: arguments of `to_bayesian`.
            method: the predictive that delta is for.
            label_columns: columns that are stacked as labels (B, K), such as the start and the end of a span; by
                default the labels are in the batches.
            options: of `calibrate_delta`.
        """
        args, rows = self.args, self.validation
        if hasattr(rows, "column_names"):  # as the Trainer does; its own loader would deal the rows out to processes
            rows = trained._remove_unused_columns(rows, description="evaluation")
        loader = DataLoader(rows, args.per_device_eval_batch_size, collate_fn=trained.data_collator)
        batches = [{name: value.to(args.device) for name, value in batch.items()} for batch in loader]
        labels = None
        if label_columns:
            labels = [torch.stack([batch.pop(name) for name in label_columns], dim=1) for batch in batches]
        settings = {"num_samples": args.num_eval_samples, "seed": args.eval_seed, **options}
        if is_regression(trained.model):
            settings = {"noise_std": training_rmse(trained), **settings}
        settings["progress"] = args.process_index == 0 and not args.disable_tqdm
        return calibrate_delta(trained.model.to(args.device), batches, labels, method=method, **settings, **conversion)

    def fit_variational(self, trained: BayesianTrainer, how: ConversionArguments, **search: Any) -> BayesianTrainer:
        """Return the trainer of `to_bayesian` around a copy of the trained weights, after the ELBO's training.

        Args:
            trained: the deterministic model's trainer.
            how: the conversion's flags; without a delta, that of `best_delta`.
            search: options of `best_delta`.
        """
        rate = self.args.bayesian_learning_rate
        rate = self.args.learning_rate / 10 if rate is None else rate
        model = self._converted(trained, how, **search)
        return self.fit(model, BAYESIAN, num_train_epochs=self.args.bayesian_epochs, learning_rate=rate)

    def fit_linearized(self, trained: BayesianTrainer, how: ConversionArguments, **search: Any) -> BayesianTrainer:
        """Return a trainer of noise around the trained weights, whose predictions are linearised; nothing is trained.

        Args:
            trained: the deterministic model's trainer.
            how: the conversion's flags; without a delta, that which suits the linearised network best.
            search: options of `best_delta`.
        """
        trainer = self.trainer(self._converted(trained, how, method="glm", **search), LINEARIZED, eval_method="glm")
        if is_regression(trainer.model):
            trainer.noise_std()  # the residual, which is saved with the model
        return trainer

    def _converted(self, trained: BayesianTrainer, how: ConversionArguments, **search: Any) -> nn.Module:
        delta = self.best_delta(trained, how.conversion, **search) if how.delta is None else how.delta
        return to_bayesian(copy.deepcopy(trained.model), delta, **how.conversion)

    def fit_laplace(self, trained: BayesianTrainer, name: str, **options: Any) -> BayesianTrainer:
        """A Gaussian around a copy of the trained weights, from the curvature there; options: of `fit_laplace`."""
        trainer = self.trainer(copy.deepcopy(trained.model), name)
        trainer.fit_laplace(validation_dataset=self.validation, **options)
        return trainer
