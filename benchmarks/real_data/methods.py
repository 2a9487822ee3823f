"""The rows of the table: each fits on a checkpoint, chooses on its held-out rows, and predicts any part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification

from bayeformers import VariationalPosterior, calibrate_delta, laplace, metrics, to_bayesian
from bayeformers.posteriors import PointPosterior

from .context import Context, Predictor
from .data import labels
from .elbo import ESTIMATOR_ROWS, PRIOR_ROWS
from .laplace_torch import last_layer
from .prediction import of_posterior

NUM_SAMPLES = 16
CALIBRATION_ROWS = {"sample": 160, "glm": 1000}  # a sampled search passes CALIBRATION_SAMPLES times per delta over them
CALIBRATION_SAMPLES = 8

Method = Callable[[Context], tuple[Predictor, dict[str, Any]]]
"""What a method does: fit and choose, then return a predictor and what was chosen, for the record."""


def mean_network(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The fine-tuned model itself."""
    return of_posterior(context, PointPosterior(context.model())), {}


def temperature(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The fine-tuned model's logits divided by one number, which is fitted on the held-out rows."""
    held_out = np.log(context.saved("map", "held_out")["probs"])
    value = metrics.fit_temperature(held_out, labels(context.held_out))

    def predict(part: str) -> dict[str, np.ndarray]:
        return {"probs": _softmax(np.log(context.saved("map", part)["probs"]) / value)}

    return predict, {"temperature": value}


def variational_sampled(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """sigma = delta |w| without training, delta chosen on held-out rows; the network is sampled."""
    return _untrained_variational(context, method="sample", num_samples=NUM_SAMPLES)


def variational_linearised(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The same for the linearised network, with a delta of its own."""
    return _untrained_variational(context, method="glm")


def laplace_torch_last_layer(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """laplace-torch as its documentation uses it with transformers: Kronecker factors, evidence, probit."""
    return last_layer(context, "kron")


def laplace_torch_last_layer_full(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The same with the dense Gauss-Newton matrix of the last layer."""
    return last_layer(context, "full")


def laplace_posterior(
    context: Context, *, rows: int | None = None, predict: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Predictor, dict[str, Any]]:
    """This package's Laplace posterior, fitted on the training rows; the held-out rows choose its prior if asked to.

    ``rows``: only so many training rows, in random order, for the curvature, which is scaled up.
    Methods of one run that differ in the prior or in the prediction share a fit.
    """
    prior_precision = options.pop("prior_precision", "marglik")
    key = (rows, *sorted(options.items()))
    if key not in context.fits:
        context.fits[key] = laplace.fit(
            context.model(),
            context.batches(context.train[:rows]),
            num_data=len(context.train),
            progress=False,
            **options,
        )
    validation = context.batches(context.held_out[: CALIBRATION_ROWS["glm"]]) if prior_precision == "holdout" else None
    posterior = laplace.tune(context.fits[key], prior_precision, validation=validation, progress=False)
    chosen = {
        "prior_precision": posterior.prior_precision,
        "log_marginal_likelihood": posterior.log_marginal_likelihood,
    }
    return of_posterior(context, posterior, **(predict or {"method": "glm", "contrasts": True})), chosen


def laplace_pretrained_mean(context: Context) -> tuple[Predictor, dict[str, Any]]:
    """The evidence under a prior around the pretrained weights instead of 0."""
    if context.pretrained is None:
        raise SystemExit("laplace_pretrained_mean needs --model, the pretrained encoder.")
    origin = AutoModelForSequenceClassification.from_pretrained(context.pretrained, num_labels=2)
    posterior = laplace.fit(context.model(), context.batches(context.train), prior_mean=origin, progress=False)
    chosen = {
        "prior_precision": posterior.prior_precision,
        "squared_distance": sum(posterior.record.squared_distances.values()),
    }
    return of_posterior(context, posterior, method="glm", contrasts=True), chosen


METHODS: dict[str, Method] = {
    "map": mean_network,
    "temperature": temperature,
    "variational_sampled": variational_sampled,
    "variational_linearised": variational_linearised,
    "laplace_torch_last_layer": laplace_torch_last_layer,
    "laplace_torch_last_layer_full": laplace_torch_last_layer_full,
    "laplace_last_layer": partial(laplace_posterior, subset="last_layer"),
    "laplace": laplace_posterior,
    "laplace_holdout": partial(laplace_posterior, prior_precision="holdout"),
    "laplace_ekfac": partial(laplace_posterior, curvature="ekfac", rows=2000),
    "laplace_mc": partial(laplace_posterior, fisher="mc"),
    "laplace_per_layer": partial(laplace_posterior, prior_precision="marglik_per_layer"),
    "laplace_pretrained_mean": laplace_pretrained_mean,
    "laplace_probit_diagonal": partial(laplace_posterior, predict={"method": "glm", "link": "probit_diagonal"}),
    "laplace_network": partial(laplace_posterior, predict={"method": "nn", "num_samples": NUM_SAMPLES}),
    **ESTIMATOR_ROWS,
    **PRIOR_ROWS,
}
"""By name, in the order of the table. `temperature` reads what `map` saved."""


def _untrained_variational(context: Context, **options: Any) -> tuple[Predictor, dict[str, Any]]:
    model, rows = context.model(), context.held_out[: CALIBRATION_ROWS[options["method"]]]
    search = options | ({"num_samples": CALIBRATION_SAMPLES} if options["method"] == "sample" else {})
    delta = calibrate_delta(model, context.batches(rows), progress=False, **search)
    posterior = VariationalPosterior(to_bayesian(model, delta))
    return of_posterior(context, posterior, **options), {"delta": delta, "calibration_rows": len(rows), **options}


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))
