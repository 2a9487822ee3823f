"""Posteriors of several networks: the checkpoints of other seeds, and snapshots of further training."""

from __future__ import annotations

from typing import Any

from bayeformers import posteriors, training
from benchmarks.real_data.context import Context, Predictor
from benchmarks.real_data.data import BATCH_SIZE
from benchmarks.real_data.prediction import of_posterior

from .dropout import NUM_SAMPLES
from .fits import fitted
from .trained import trained

NUM_MEMBERS = 5
SWAG_LEARNING_RATE = 2e-5


def members(context: Context) -> list[Context]:
    """This checkpoint and those of other seeds, `NUM_MEMBERS` of them.

    Raises:
        ValueError: there is no other.
    """
    found = context.members[:NUM_MEMBERS]
    if len(found) < 2:
        raise ValueError(
            f"an ensemble needs checkpoints of two seeds of {context.task}, there is {context.seed} alone."
        )
    return found


def ensemble(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The average of fine-tunings that differ in their seed (Lakshminarayanan et al. 2017, arXiv 1612.01474)."""
    found = members(context)
    posterior = posteriors.EnsemblePosterior(context.model(), [member.folder for member in found])
    seeds = [member.seed for member in found]
    return of_posterior(context, posterior, num_samples=len(found)), {"members": seeds}


def laplace_ensemble(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """A mixture of Laplace posteriors, one around each member (Eschenhagen et al. 2021, arXiv 2111.03577)."""
    found = [(member, fitted(member, prior_precision="holdout")) for member in members(context)]
    posterior = posteriors.MixturePosterior([each for _, (each, _) in found])
    chosen = {
        "members": [member.seed for member, _ in found],
        "prior_precision": [each.prior_precision for _, (each, _) in found],
        "shared_seconds": sum(cost.get("shared_seconds", 0.0) for _, (_, cost) in found),
    }
    return of_posterior(context, posterior), chosen


def swag(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """An epoch more at a constant rate, whose snapshots are a Gaussian (Maddox et al. 2019, arXiv 1902.02476)."""
    model, rows = context.model(), context.train
    every = max(1, len(rows) // BATCH_SIZE // 8)
    callback = training.SWAGCallback(start=0, every=every, lr=SWAG_LEARNING_RATE)
    trained(context, model, [callback], num_train_epochs=1)
    posterior = callback.posterior(model.eval())
    return of_posterior(context, posterior, num_samples=NUM_SAMPLES), {"lr": SWAG_LEARNING_RATE, "every": every}
