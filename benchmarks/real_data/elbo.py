"""Rows that train the ELBO from the checkpoint: estimators and priors at equal steps."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from transformers import DataCollatorWithPadding

from bayeformers import (
    ARDPrior,
    BayesianTrainer,
    BayesianTrainingArguments,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    LogUniformPrior,
    MopedPrior,
    NormalPrior,
    ScaleMixturePrior,
    VariationalPosterior,
    to_bayesian,
)
from bayeformers.distributions import Prior

from .context import Context, Predictor
from .prediction import of_posterior

STEPS, BATCH = 60, 16
DELTA = 0.2
RHO_LEARNING_RATE = 3e-2
MEAN_LEARNING_RATE = 2e-5
NUM_SAMPLES = 8

PRIORS: dict[str, Prior] = {
    "moped": MopedPrior(),
    "normal": NormalPrior(std=0.05),
    "scale_mixture": ScaleMixturePrior(pi=0.5, std1=0.1, std2=0.01),
    "empirical_bayes": EmpiricalBayesPrior(),
    "double_exponential": DoubleExponentialPrior(scale=0.05),
    "log_uniform": LogUniformPrior(),
    "ard": ARDPrior(),
}
"""Absolute widths are near the encoder's own weights, whose mean size is 0.04; wider ones dissolve it sooner."""


def train_elbo(
    context: Context,
    *,
    prior: Prior = PRIORS["moped"],
    estimator: str = "reparameterization",
    freeze: bool = True,
    kl_weight: float = 0.01,
) -> tuple[Predictor, dict[str, Any]]:
    """STEPS optimizer steps on the ELBO; the seconds of the fit are theirs."""
    model = to_bayesian(context.model(), DELTA, freeze, prior=prior, estimator=estimator)
    with tempfile.TemporaryDirectory() as folder:
        arguments = BayesianTrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=MEAN_LEARNING_RATE,
            rho_learning_rate=RHO_LEARNING_RATE,
            lr_scheduler_type="linear",
            kl_weight=kl_weight,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=STEPS,
            report_to=[],
            seed=context.seed,
            use_cpu=True,
            disable_tqdm=True,
        )
        collate = DataCollatorWithPadding(context.tokenizer)
        trainer = BayesianTrainer(model, arguments, train_dataset=context.train, data_collator=collate)
        trainer.train()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    chosen = {"steps": STEPS, "batch": BATCH, "delta": DELTA, "nll": logged["nll"], "kl": logged["kl"]}
    return of_posterior(context, VariationalPosterior(model), method="sample", num_samples=NUM_SAMPLES), chosen


ESTIMATOR_ROWS = {
    f"elbo_{name}": partial(train_elbo, estimator=name, freeze=False)
    for name in ("reparameterization", "flipout", "local_reparameterization")
}
"""The means train too: they are what a noisy gradient disturbs."""

PRIOR_ROWS = {f"prior_{name}": partial(train_elbo, prior=prior) for name, prior in PRIORS.items()}
"""The means are frozen: what differs is where the scales are pulled to."""
