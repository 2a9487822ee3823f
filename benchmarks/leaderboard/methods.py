"""The methods of the board: each fits on a checkpoint, chooses on its held-out rows, and predicts any part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bayeformers import VariationalPosterior, calibrate_delta, posteriors, to_bayesian
from benchmarks.real_data.context import Context, Predictor
from benchmarks.real_data.methods import CALIBRATION_ROWS, mean_network
from benchmarks.real_data.prediction import of_posterior

from .dropout import NUM_SAMPLES, mc_dropout, tuned_dropout
from .fits import fitted
from .members import ensemble, laplace_ensemble, swag
from .recalibrated import averaged, recalibrated
from .trained import ivon, sghmc, snapshots, sngp, vbll

GLM = {"method": "glm", "contrasts": True}

Run = Callable[[Context], tuple[Predictor, dict[str, Any]]]
"""Fit and choose, then return a predictor and what was chosen, for the record.

Of what is chosen the board reads "reads", other methods whose predictions are taken, and "members", the seeds of the
checkpoints that are used besides the row's own: their costs are added. With members, "reads" is of each of them.
"""


@dataclass(frozen=True)
class Method:
    """A row of the table: what it does, and what it is called."""

    run: Run
    title: str


def laplace(context: Context, *, prior_precision: str = "holdout", **options: Any) -> tuple[Predictor, dict[str, Any]]:
    """A Laplace posterior at the tau of a rule, linearised; rows that differ in the rule alone share a fit."""
    posterior, shared = fitted(context, prior_precision=prior_precision, **options)
    chosen = {"prior_precision": posterior.prior_precision, **shared}
    return of_posterior(context, posterior, **GLM), chosen


def delta(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """Noise delta |w| around the weights, linearised; delta by the held-out NLL."""
    model, rows = context.model(), context.held_out[: CALIBRATION_ROWS["glm"]]
    value = calibrate_delta(model, context.batches(rows), method="glm", progress=False)
    posterior = VariationalPosterior(to_bayesian(model, value))
    return of_posterior(context, posterior, **GLM), {"delta": value}


def unit_dropout(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """Dropout whose masks are of units, the same for all rows and positions: a draw is one network."""
    posterior = posteriors.DropoutPosterior(context.model(), masks="unit")
    return of_posterior(context, posterior, num_samples=NUM_SAMPLES), {"num_samples": NUM_SAMPLES}


METHODS: dict[str, Method] = {
    "map": Method(mean_network, "fine-tuned (MAP)"),
    "temperature": Method(partial(recalibrated, base="map"), "MAP + temperature"),
    "mc_dropout": Method(mc_dropout, "MC dropout"),
    "mc_dropout_temperature": Method(partial(recalibrated, base="mc_dropout"), "MC dropout + temperature"),
    "dropout_tuned": Method(tuned_dropout, "MC dropout, rate by held-out rows"),
    "dropout_tuned_temperature": Method(
        partial(recalibrated, base="dropout_tuned"), "MC dropout, rate by held-out rows, + temperature"
    ),
    "unit_dropout": Method(unit_dropout, "MC dropout, masks of units"),
    "unit_dropout_temperature": Method(
        partial(recalibrated, base="unit_dropout"), "MC dropout, masks of units, + temperature"
    ),
    "evidence": Method(partial(laplace, prior_precision="marglik"), "Laplace, tau by evidence"),
    "holdout": Method(laplace, "Laplace, tau by held-out rows"),
    "leverage": Method(partial(laplace, prior_precision="leverage"), "Laplace, tau by leverage"),
    "dropout_and_laplace": Method(partial(averaged, bases=("mc_dropout", "holdout")), "MC dropout and Laplace, mixed"),
    "dropout_and_laplace_temperature": Method(
        partial(recalibrated, base="dropout_and_laplace"), "MC dropout and Laplace, mixed, + temperature"
    ),
    "laplace_last_layer": Method(partial(laplace, subset="last_layer"), "Laplace, last layer"),
    "delta_glm": Method(delta, "delta |w|, linearised"),
    "swag": Method(swag, "SWAG"),
    "swag_temperature": Method(partial(recalibrated, base="swag"), "SWAG + temperature"),
    "snapshots": Method(snapshots, "snapshots of one training"),
    "snapshots_temperature": Method(partial(recalibrated, base="snapshots"), "snapshots + temperature"),
    "sghmc": Method(sghmc, "cyclical SGHMC"),
    "ivon": Method(ivon, "IVON"),
    "ivon_temperature": Method(partial(recalibrated, base="ivon"), "IVON + temperature"),
    "vbll": Method(vbll, "VBLL head"),
    "sngp": Method(sngp, "SNGP head"),
    "ensemble": Method(ensemble, "ensemble"),
    "ensemble_temperature": Method(partial(recalibrated, base="ensemble"), "ensemble + temperature"),
    "laplace_ensemble": Method(laplace_ensemble, "ensemble of Laplace posteriors"),
}
"""By name, in the order of the table. One that reads another's predictions stands below it."""
REFERENCES = ("map", "temperature", "mc_dropout")
"""What every method is compared with, row by row of the data."""
