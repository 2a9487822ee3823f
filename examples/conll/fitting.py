"""Model, tokenizer, and the posteriors around the trained model; what they say about every word of a set."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import bayeformers
from bayeformers import BayesianTrainer, LaplacePosterior, calibrate_delta, to_bayesian
from bayeformers.laplace import PrecisionChoice
from bayeformers.posteriors import PointPosterior
from examples.conll.arguments import TokenModelArguments, TokenTrainingArguments
from examples.conll.data import Encoded, TokenData
from examples.glue.models import BAYESIAN, DETERMINISTIC
from examples.glue.tiny_bert import make_model, make_tokenizer
from examples.glue.training import phase_arguments, with_short_progress
from examples.held_out import RecordRows, TrainingRows
from examples.linearized import linearized_draws
from examples.running import say

CERTAIN = -60.0
"""Log-probability of what cannot be: of the other labels of a word without a piece, which counts as O."""
HELD_OUT = 256
"""Validation sentences that choose the Laplace posterior's prior precision."""
LOG_PRECISIONS = (-1.0, 6.0)
"""Between which decimal logarithms it is sought."""
_NEED_PREFIX_SPACE = ("bloom", "gpt2", "roberta", "deberta", "longformer")

Draws = list[NDArray[np.float32]]
"""Of each sentence, log-probabilities (S draws, words, labels)."""


@dataclass(frozen=True)
class Task:
    """What every fit needs."""

    model_args: TokenModelArguments
    args: TokenTrainingArguments
    tokenizer: PreTrainedTokenizerBase
    train: Encoded
    validation: Encoded
    rows: TrainingRows | None = None


def load_tokenizer(name_or_path: str | None, data: TokenData) -> PreTrainedTokenizerBase:
    """The pretrained tokenizer; without a name, one made from the training sentences."""
    if name_or_path is None:
        return make_tokenizer(" ".join(one.words) for one in data.train)
    kind = AutoConfig.from_pretrained(name_or_path).model_type
    options = {"add_prefix_space": True} if kind in _NEED_PREFIX_SPACE else {}
    return AutoTokenizer.from_pretrained(name_or_path, **options)


def load_model(name_or_path: str | None, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A pretrained encoder with a head per word; without a name, a tiny BERT."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if name_or_path is None:
        config = make_model(len(tokenizer), len(labels)).config
        config.update(names)
        return BertForTokenClassification(config)
    return AutoModelForTokenClassification.from_pretrained(
        name_or_path,
        num_labels=len(labels),
        ignore_mismatched_sizes=True,  # the head of another task
        **names,
    )


def load_saved(name: str, folder: Path) -> PreTrainedModel:
    """A model of an earlier run; with its posterior, unless it is the deterministic one."""
    if name == DETERMINISTIC:
        return AutoModelForTokenClassification.from_pretrained(folder)
    return bayeformers.from_pretrained(folder)


# -- fits -------------------------------------------------------------------------------------------------------------


def make_trainer(model: PreTrainedModel, task: Task, name: str, **changes: Any) -> BayesianTrainer:
    """A trainer that stops and keeps the best epoch by the validation NLL per word."""
    args = phase_arguments(task.args, name, **changes)
    trainer = BayesianTrainer(
        model=model,
        args=args,
        train_dataset=task.train.dataset,
        eval_dataset=task.validation.dataset,
        data_collator=DataCollatorForTokenClassification(task.tokenizer),
        processing_class=task.tokenizer,
        callbacks=[EarlyStoppingCallback(args.patience), RecordRows(task.rows)],
    )
    return with_short_progress(trainer)


def fit_deterministic(model: PreTrainedModel, task: Task) -> BayesianTrainer:
    """Ordinary training; with ``num_train_epochs`` 0 the model is taken as it is."""
    trainer = make_trainer(model, task, DETERMINISTIC)
    if task.args.num_train_epochs > 0:
        trainer.train()
    return trainer


def fit_variational(trained: BayesianTrainer, task: Task) -> BayesianTrainer:
    """`to_bayesian` around the trained weights, then the ELBO."""
    args, model_args = task.args, task.model_args
    delta = best_delta(trained, task) if model_args.delta is None else model_args.delta
    model = to_bayesian(trained.model, delta, **model_args.conversion)
    rate = args.bayesian_learning_rate if args.bayesian_learning_rate is not None else args.learning_rate / 10
    trainer = make_trainer(model, task, BAYESIAN, num_train_epochs=args.bayesian_epochs, learning_rate=rate)
    if args.bayesian_epochs > 0:
        trainer.train()
    return trainer


def best_delta(trained: BayesianTrainer, task: Task) -> float:
    """The delta of least validation NLL for the trained model."""
    args = task.args
    loader = DataLoader(task.validation.dataset, args.per_device_eval_batch_size, collate_fn=trained.data_collator)
    return calibrate_delta(
        trained.model.to(args.device),
        [batch.to(args.device) for batch in loader],
        num_samples=args.num_eval_samples,
        seed=args.eval_seed,
        progress=args.process_index == 0 and not args.disable_tqdm,
        **task.model_args.conversion,
    )


def fit_laplace(trained: BayesianTrainer, task: Task, initial: PreTrainedModel | None) -> BayesianTrainer:
    """A Gaussian around the trained weights; ``initial``: the pretrained model, where the prior's mean is.

    "holdout" is the prior precision of least validation NLL of the predictions made here, `draw_words`. The exact
    linearised predictive, which `fit_laplace` would judge, costs a backward pass per position and label.
    """
    options = {"subset": task.model_args.laplace_subset, "prior_mean": initial, **task.model_args.laplace}
    if options["prior_precision"] != "holdout":
        trained.fit_laplace(**options)
        return trained
    posterior = trained.fit_laplace(**{**options, "prior_precision": 1.0})
    held_out = task.validation.first(HELD_OUT)

    def nll(log_precision: float) -> float:
        trained.posterior = posterior.with_prior_precision(10.0**log_precision)
        return mean_nll(draw_words(trained, held_out), held_out)

    best = minimize_scalar(nll, bounds=LOG_PRECISIONS, method="bounded", options={"xatol": 0.1, "maxiter": 12})
    low, high = LOG_PRECISIONS
    end = (
        "smallest" if best.x < low + 0.2 else "largest" if best.x > high - 0.2 else None
    )  # xatol keeps it from the ends
    choice = PrecisionChoice(method="holdout", at_grid_end=end)
    trained.posterior = posterior.with_prior_precision(10.0 ** float(best.x), choice)
    say(f"tau = {10.0 ** float(best.x):.4g}, of least NLL on {len(held_out.dataset)} validation sentences.")
    return trained


def mean_nll(draws: Draws, encoded: Encoded) -> float:
    """-log of the mean probability of the label, averaged over the words that have a piece."""
    found: list[float] = []
    for log_probs, labels, first in zip(draws, encoded.dataset["labels"], encoded.first_pieces, strict=True):
        mean = np.exp(log_probs.astype(np.float64)).mean(0)
        found += [-np.log(max(mean[i, labels[p]], np.exp(CERTAIN))) for i, p in enumerate(first) if p >= 0]
    return float(np.mean(found))


def copy_of(model: PreTrainedModel, name_or_path: str | None) -> PreTrainedModel | None:
    """The pretrained weights before they are fine-tuned; None of a model that begins with random ones."""
    return None if name_or_path is None else copy.deepcopy(model)


# -- draws ------------------------------------------------------------------------------------------------------------


def draw_words(trainer: BayesianTrainer, encoded: Encoded) -> Draws:
    """Log-probabilities of every word under each draw of the trainer's posterior, or of its point estimate.

    Draw s is one network (of a Laplace posterior: its linearisation) in every sentence, so that words of one sentence
    vary together, as the probability of a whole entity needs.
    """
    args = trainer.args
    columns = {"labels"} & set(encoded.dataset.column_names)
    dataset = encoded.dataset.remove_columns(sorted(columns))
    loader = DataLoader(dataset, args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    found: Draws = []
    for batch in tqdm(loader, "predicting", disable=args.disable_tqdm or args.process_index > 0, leave=False):
        log_probs = torch.stack(list(_passes(trainer, batch.to(args.device)))).log_softmax(-1).float().cpu().numpy()
        for index in range(log_probs.shape[1]):
            found.append(at_words(log_probs[:, index], encoded.first_pieces[len(found)]))
    return found


def _passes(trainer: BayesianTrainer, inputs: Any) -> Iterator[Tensor]:
    """Logits (B, T, C), one per draw."""
    posterior, args = trainer.posterior or PointPosterior(trainer.model), trainer.args
    if isinstance(posterior, LaplacePosterior):
        yield from linearized_draws(posterior, inputs, num_samples=args.num_eval_samples, seed=args.eval_seed)
        return
    for output in posterior.passes(inputs, num_samples=args.num_eval_samples, seed=args.eval_seed):
        yield output.logits.detach().float()


def at_words(log_probs: NDArray[np.float32], first_pieces: list[int]) -> NDArray[np.float32]:
    """From pieces (S, T, C) to words (S, n, C); a word without a piece is O for certain."""
    positions = np.asarray(first_pieces)
    words = log_probs[:, positions.clip(0)]
    missing = positions < 0
    words[:, missing] = CERTAIN
    words[:, missing, 0] = 0.0
    return words
