"""The methods: those that share the plain adapter, and those that train a Bayesian one from the same beginning."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from bayeformers import to_bayesian
from bayeformers.adapters import BlobReweighting, fit_tfb, to_blob, to_scalabl
from bayeformers.posteriors import PointPosterior
from benchmarks.leaderboard.dropout import mc_dropout, set_rate
from benchmarks.leaderboard.fits import fitted
from benchmarks.leaderboard.methods import Method
from benchmarks.leaderboard.recalibrated import recalibrated
from benchmarks.real_data.context import Arrays, Predictor
from benchmarks.real_data.data import Batch
from benchmarks.real_data.methods import mean_network
from benchmarks.real_data.prediction import of_posterior

from .context import AdapterContext
from .training import train

NUM_SAMPLES = 10
"""Draws of every method that draws: the published tables'."""
NUM_MEMBERS = 3
LAPLACE_BATCHES = {"encoder": 50, "decoder": 12}
"""Random batches of the curvature, each of 32 rows: a row costs a backward pass per class."""

BLOB_EPSILON = 0.05
BLOB_KL_WEIGHT = 0.1
ANCHOR_ROWS, ANCHOR_SAMPLES = 60, 4
"""Of TFB's search: held-out rows, and draws per try."""

Result = tuple[Predictor, dict[str, Any]]


def drawn(context: AdapterContext, posterior: Any) -> Predictor:
    """The mean of a posterior's draws, and the draws (B, S, C), which scores of the epistemic part read."""

    def arrays(batch: Batch) -> dict[str, Tensor]:
        predictive = posterior.predict(batch, num_samples=NUM_SAMPLES, method="sample")
        draws = predictive.log_probs.double().exp().movedim(0, 1)
        return {"probs": draws.mean(1), "draws": draws}

    return lambda part: context.predict(part, arrays)


def ensemble(context: AdapterContext) -> Result:
    """The mean of the predictions of adapters that differ in their seed (arXiv 2310.00035).

    Raises:
        ValueError: another seed has no predictions yet.
    """
    members = [
        member
        for member in context.members
        if (member.folder / "predictions" / "map.json").exists() and member.seed < NUM_MEMBERS
    ]
    if len(members) < NUM_MEMBERS:
        found = sorted(member.seed for member in members)
        raise ValueError(
            f"an ensemble needs the predictions of {NUM_MEMBERS} plain adapters of {context.task}, there are those of "
            f"seeds {found}."
        )

    def predict(part: str) -> Arrays:
        draws = np.stack([member.saved("map", part)["probs"] for member in members], axis=1)
        return {"probs": draws.mean(1), "draws": draws}

    return predict, {"reads": ["map"], "members": sorted(member.seed for member in members)}


def no_dropout(context: AdapterContext) -> Result:
    """The control of methods that convert before they train: conversion switches dropout off."""
    model = context.fresh()
    set_rate(model, 0.0)
    return of_posterior(context, PointPosterior(train(context, model).model)), {}


def default(context: AdapterContext) -> Result:
    """`to_bayesian` with no argument but the model, trained by its ELBO."""
    trainer = train(context, to_bayesian(context.fresh()))
    return drawn(context, trainer.posterior), {"num_samples": NUM_SAMPLES}


def blob(context: AdapterContext) -> Result:
    """BLoB (arXiv 2406.11675): A is random and B is not; trained by the ELBO with a weight of the KL below 1."""
    model = to_blob(context.fresh(), seed=context.seed)
    rate = 2 * context.settings.learning_rate / BLOB_EPSILON
    trainer = train(context, model, [BlobReweighting()], rho_learning_rate=rate, kl_weight=BLOB_KL_WEIGHT)
    chosen = {"num_samples": NUM_SAMPLES, "kl_weight": BLOB_KL_WEIGHT}
    return drawn(context, trainer.posterior), chosen


def scalabl(context: AdapterContext) -> Result:
    """ScalaBL (arXiv 2506.21408): a variance per rank, by the plain ELBO."""
    trainer = train(context, to_scalabl(context.fresh()))
    return drawn(context, trainer.posterior), {"num_samples": NUM_SAMPLES}


def tfb(context: AdapterContext) -> Result:
    """TFB (arXiv 2412.05723): the plain adapter with the largest noise that held-out rows bear."""
    batches = context.batches(context.held_out[:ANCHOR_ROWS])
    posterior = fit_tfb(context.model(), batches, num_samples=ANCHOR_SAMPLES, progress=False)
    return drawn(context, posterior), {"sigma": posterior.scale_found}


def laplace(context: AdapterContext) -> Result:
    """Laplace-LoRA (arXiv 2308.13111): Kronecker factors of A and B, linearised, tau by the held-out NLL."""
    posterior, shared = fitted(context, prior_precision="holdout", num_batches=LAPLACE_BATCHES[context.settings.model])
    predictor = of_posterior(context, posterior, method="glm", contrasts=True)
    return predictor, {"prior_precision": posterior.prior_precision, **shared}


METHODS: dict[str, Method] = {
    "map": Method(mean_network, "plain LoRA"),
    "no_dropout": Method(no_dropout, "plain LoRA, trained without dropout"),
    "temperature": Method(partial(recalibrated, base="map"), "plain LoRA + temperature"),
    "mc_dropout": Method(partial(mc_dropout, num_samples=NUM_SAMPLES), "MC dropout"),
    "ensemble": Method(ensemble, "ensemble of 3"),
    "tfb": Method(tfb, "TFB"),
    "laplace": Method(laplace, "Laplace-LoRA"),
    "blob": Method(blob, "BLoB"),
    "scalabl": Method(scalabl, "ScalaBL"),
    "default": Method(default, "to_bayesian, no argument"),
}
"""By name, in the order of the tables."""
READ = frozenset({"map"})
"""Those whose held-out predictions another method reads."""
