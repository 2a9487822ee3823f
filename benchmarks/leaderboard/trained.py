"""Posteriors that a training of its own makes, from the pretrained encoder, over as many epochs as the checkpoint's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from torch import nn, optim
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, TrainerCallback, set_seed

from bayeformers import BayesianTrainer, BayesianTrainingArguments, heads, training
from bayeformers import optim as bayesian_optim
from bayeformers.tasks import TEXT_TASKS
from benchmarks.real_data.context import Context, Predictor
from benchmarks.real_data.data import BATCH_SIZE
from benchmarks.real_data.finetune import LEARNING_RATES
from benchmarks.real_data.prediction import of_posterior

from .dropout import NUM_SAMPLES

IVON = {"lr": 0.05, "ess": 1e7, "hess_init": 0.006, "beta2": 0.9995, "weight_decay": 1e-5, "clip_radius": 1e-3}
"""Set by hand for a fine-tuning of MiniLM; no reported row was looked at."""
CYCLES = 4
CHAIN = {"lr": 0.02, "momentum": 0.9, "temperature": 1.0, "prior_precision": 100.0}


def vbll(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """A variational last layer (Harrison et al. 2024, arXiv 2404.11599), trained with the encoder by its bound."""
    trainer = trained(context, heads.to_vbll(_pretrained(context)))
    return of_posterior(context, trainer.posterior), {}


def sngp(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """A Gaussian process on random features (Liu et al. 2022, arXiv 2205.00403), trained with the encoder."""
    trainer = trained(context, heads.to_sngp(_pretrained(context)))
    return of_posterior(context, trainer.posterior), {}


def ivon(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """IVON in AdamW's place (Shen et al. 2024, arXiv 2402.17641)."""
    model = _pretrained(context)
    optimizer = bayesian_optim.IVON(model.parameters(), **IVON)
    posterior = trained(context, model, optimizer=optimizer).posterior
    return of_posterior(context, posterior, num_samples=NUM_SAMPLES), dict(IVON)


def snapshots(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The ends of AdamW's cycles, a snapshot ensemble of one training (Huang et al. 2017, arXiv 1704.00109)."""
    rate = LEARNING_RATES.get(context.task, 5e-5)
    cycles = training.CyclicalCallback(num_cycles=CYCLES, lr=rate)
    model = _pretrained(context)
    trainer = trained(context, model, [cycles], optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0))
    return _of_cycles(context, trainer, cycles), {"lr": rate, "cycles": CYCLES}


def sghmc(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """Cyclical SGHMC around the pretrained weights (Zhang et al. 2020, arXiv 1902.03932)."""
    cycles = training.CyclicalCallback(num_cycles=CYCLES, lr=CHAIN["lr"], samples_per_cycle=2)
    model, count = _pretrained(context), len(context.train)
    optimizer = bayesian_optim.SGHMC(model.parameters(), num_data=count, prior_mean="start", seed=context.seed, **CHAIN)
    trainer = trained(context, model, [cycles], optimizer, max_grad_norm=0.0)
    return _of_cycles(context, trainer, cycles), {**CHAIN, "cycles": CYCLES}


def _of_cycles(context: Context, trainer: BayesianTrainer, cycles: training.CyclicalCallback) -> Predictor:
    posterior = cycles.posterior(trainer.model.eval())
    return of_posterior(context, posterior, num_samples=posterior.num_draws)


def _pretrained(context: Context) -> Any:
    """The encoder with a new head, the same for all methods of a seed.

    Raises:
        ValueError: the board does not know the encoder.
    """
    if context.pretrained is None:
        raise ValueError("this method trains from the pretrained encoder: give --model.")
    set_seed(context.seed)
    labels = TEXT_TASKS[context.task].num_labels
    return AutoModelForSequenceClassification.from_pretrained(context.pretrained, num_labels=labels)


def trained(
    context: Context,
    model: nn.Module,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: optim.Optimizer | None = None,
    **changes: Any,
) -> BayesianTrainer:
    """A trainer at the end of a training that is the checkpoint's own, but for ``changes``."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "num_train_epochs": context.training["epoch"],
            "learning_rate": LEARNING_RATES.get(context.task, 5e-5),
            "per_device_train_batch_size": BATCH_SIZE,
            "train_sampling_strategy": "group_by_length",
            "save_strategy": "no",
            "report_to": [],
            "seed": context.seed,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = BayesianTrainer(
            model=model,
            args=BayesianTrainingArguments(folder, **{**options, **changes}),
            train_dataset=context.train,
            data_collator=DataCollatorWithPadding(context.tokenizer),
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        trainer.train()
    trainer.model.eval()
    return trainer
