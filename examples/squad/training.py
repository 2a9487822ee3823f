"""Fitting: the point estimate with early stopping, and the variational posterior around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bayeformers import BayesianTrainer, calibrate_delta, to_bayesian
from examples.glue.training import phase_arguments, with_short_progress
from examples.held_out import RecordRows, TrainingRows, save_rows
from examples.squad.arguments import ExampleTrainingArguments, ModelArguments
from examples.squad.data import SquadData
from examples.squad.tiny_bert import make_model, make_tokenizer
from examples.squad.windows import Readings

DETERMINISTIC, BAYESIAN = "deterministic", "bayesian"
"""Folders of the models within an output folder."""


def load_tokenizer(name_or_path: str | None, data: SquadData) -> PreTrainedTokenizerBase:
    """The pretrained tokenizer; without a name, one made from the training questions and texts."""
    if name_or_path is not None:
        return AutoTokenizer.from_pretrained(name_or_path)
    return make_tokenizer(text for question in data.train for text in (question.context, question.text))


def load_model(name_or_path: str | None, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreTrainedModel:
    """A pretrained encoder with a span head, new if the checkpoint has none; without a name, a tiny BERT.

    Raises:
        ValueError: the model cannot read ``max_length`` tokens.
    """
    if name_or_path is None:
        model = make_model(len(tokenizer))
    else:
        model = AutoModelForQuestionAnswering.from_pretrained(name_or_path)
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < max_length:
        raise ValueError(f"`max_seq_length` must be at most {longest}, all that the model can read, got {max_length}.")
    return model


@dataclass(frozen=True)
class Setting:
    """What both trainings share."""

    model_args: ModelArguments
    args: ExampleTrainingArguments
    train: Readings
    validation: Readings
    tokenizer: PreTrainedTokenizerBase
    rows: TrainingRows | None = None

    def trainer(self, model: PreTrainedModel, args: ExampleTrainingArguments) -> BayesianTrainer:
        """A trainer that reports on validation after each epoch, and stops and keeps the best epoch by its NLL."""
        trainer = BayesianTrainer(
            model=model,
            args=args,
            train_dataset=self.train.features,
            eval_dataset=self.validation.features,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
            callbacks=[EarlyStoppingCallback(args.patience), RecordRows(self.rows)],
        )
        return with_short_progress(trainer)

    def save(self, trainer: BayesianTrainer, name: str) -> None:
        folder = Path(self.args.output_dir or ".") / name
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            save_rows(self.rows, folder)


def fit_deterministic(model: PreTrainedModel, setting: Setting) -> BayesianTrainer:
    """Ordinary training; with ``num_train_epochs`` 0 the model is taken as it is."""
    trainer = setting.trainer(model, phase_arguments(setting.args, DETERMINISTIC))
    if setting.args.num_train_epochs > 0:
        trainer.train()
    setting.save(trainer, DETERMINISTIC)
    return trainer


def fit_variational(trained: BayesianTrainer, setting: Setting) -> BayesianTrainer:
    """`to_bayesian` around the trained weights, then the ELBO; with ``bayesian_epochs`` 0 the noise is the prior's."""
    model_args, args = setting.model_args, setting.args
    delta = best_delta(trained, setting) if model_args.delta is None else model_args.delta
    model = to_bayesian(trained.model, delta, **model_args.conversion)
    rate = args.bayesian_learning_rate if args.bayesian_learning_rate is not None else args.learning_rate / 10
    changes = {"num_train_epochs": args.bayesian_epochs, "learning_rate": rate}
    trainer = setting.trainer(model, phase_arguments(args, BAYESIAN, **changes))
    if args.bayesian_epochs > 0:
        trainer.train()
    setting.save(trainer, BAYESIAN)
    return trainer


def best_delta(trained: BayesianTrainer, setting: Setting) -> float:
    """The delta of least validation NLL of start and end; every process searches on all of the same batches.

    By as many draws as evaluation has during training: the same ones serve every delta, so that their noise cancels.
    """
    args, features = setting.args, setting.validation.features
    loader = DataLoader(features, args.per_device_eval_batch_size, collate_fn=trained.data_collator)
    batches = [batch.to(args.device) for batch in loader]
    ends = [torch.stack([batch.pop(f"{side}_positions") for side in ("start", "end")], dim=1) for batch in batches]
    return calibrate_delta(
        trained.model.to(args.device),
        batches,
        ends,
        num_samples=args.num_eval_samples_during_training or args.num_eval_samples,
        seed=args.eval_seed,
        progress=args.process_index == 0 and not args.disable_tqdm,
        **setting.model_args.conversion,
    )
