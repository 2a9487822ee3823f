"""What a model card says of a posterior: its method and the numbers that it depends on, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..conversion.record import conversion_record
from ..heads import HeadPosterior, RandomFeatureHead
from ..heads.find import find_head
from ..laplace import LaplacePosterior
from ..nn.base import variational_tensors
from ..posteriors import (
    DiagonalPosterior,
    DropoutPosterior,
    EnsemblePosterior,
    IVONPosterior,
    MixturePosterior,
    PointPosterior,
    Posterior,
    SWAGPosterior,
    TemperaturePosterior,
    VariationalPosterior,
)

__all__ = ["facts_of"]

Facts = dict[str, str]

_CHOICES = {
    "given": "as given",
    "holdout": "of least negative log-likelihood on held-out rows",
    "perturbed": "the largest that is as good as the best on {rows} training rows with words or values exchanged",
    "leverage": "the least that the evidence and the leverages of {rows} training rows allow",
    "marglik": "of largest evidence",
    "marglik_per_layer": "of largest evidence, layer by layer",
}


def facts_of(posterior: Posterior) -> Facts:
    """Return what a reader needs to know of a posterior, by name, "method" first; values are Markdown of one line.

    >>> facts_of(PointPosterior(nn.Linear(2, 2)))
    {'method': 'point estimate: one network, no posterior'}
    """
    for kind, describe in _DESCRIBED.items():
        if isinstance(posterior, kind):
            facts: Facts = describe(posterior)
            return facts
    return {"method": _code(posterior)}


def _point(posterior: PointPosterior) -> Facts:
    return {"method": "point estimate: one network, no posterior"}


def _variational(posterior: VariationalPosterior) -> Facts:
    model = posterior.model
    tensors = list(variational_tensors(model))
    random = sum(tensor.loc.numel() for tensor in tensors)
    facts = {
        "method": "variational inference: a Gaussian of each weight by itself, trained on the ELBO",
        "random weights": f"{random:,} in {len(tensors)} tensors, {_of_all(model)}",
    }
    record = conversion_record(model)
    if record is None:
        return {**facts, "conversion": "none: the layers were built by hand"}
    config = record.config
    means = "stayed where they were; only the scales trained" if config.freeze else "trained too"
    facts |= {
        "δ": f"{config.delta:g}, the initial scale relative to each weight, as given to `to_bayesian`",
        "prior": _code(config.prior),
        "N": "unknown: not trained" if config.num_training_items is None else f"{config.num_training_items:,} items",
        "λ": f"{config.kl_weight:g}, the weight of the KL",
        "means": means,
        "scales": f"{config.scale}, {config.parametrization}; estimator {_code(config.estimator)}",
    }
    if config.noise_std is not None:
        facts["noise"] = _noise(config.noise_std)
    return facts


def _laplace(posterior: LaplacePosterior) -> Facts:
    record, choice = posterior.record, posterior.choice
    taus = posterior.prior_precision
    shown = f"{taus:.4g}" if isinstance(taus, float) else f"{min(taus.values()):.4g} to {max(taus.values()):.4g}"
    weights, rows = sum(target.num_weights for target in posterior.targets), f"{choice.num_rows or 0:,}"
    centre = "a given model" if record.squared_distances else "0"
    facts = {
        "method": f"Laplace approximation: a Gaussian around the trained weights, {record.config.curvature} curvature",
        "random weights": f"{weights:,} in {len(posterior.targets)} layers, {_of_all(posterior.model)}",
        "prior": f"N({centre}, 1/τ)",
        "τ": f"{shown}, {_CHOICES[choice.method].format(rows=rows)}",
        "N": f"{record.num_data:,} examples",
        "likelihood": f"{record.config.likelihood}, temperature {posterior.temperature:g}",
    }
    if posterior.noise_std != 1.0:
        facts["noise"] = _noise(posterior.noise_std)
    if posterior.caveats:
        facts["beware"] = "; ".join(posterior.caveats)
    return facts


def _ensemble(posterior: EnsemblePosterior) -> Facts:
    return {"method": f"deep ensemble: {posterior.num_draws} networks of equal weight"}


def _swag(posterior: SWAGPosterior) -> Facts:
    moments = posterior.moments
    return {
        "method": "SWAG: a Gaussian of the weights along the end of a training",
        "snapshots": f"{moments.num_snapshots}, {moments.num_columns} columns of deviations, scale {posterior.scale:g}",
    }


def _dropout(posterior: DropoutPosterior) -> Facts:
    rate = "the model's own rates" if posterior.rate is None else f"rate {posterior.rate:g}"
    return {"method": f"Monte-Carlo dropout: {rate}, a mask per {posterior.masks}"}


def _diagonal(posterior: DiagonalPosterior) -> Facts:
    how = "IVON, an optimizer that learns scales" if isinstance(posterior, IVONPosterior) else "scales that were given"
    random = sum(scale.numel() for scale in posterior.scales.values())
    return {
        "method": f"a Gaussian of each weight by itself around the trained weights: {how}",
        "random weights": f"{random:,} in {len(posterior.scales)} tensors, {_of_all(posterior.model)}",
    }


def _head(posterior: HeadPosterior) -> Facts:
    is_sngp = isinstance(find_head(posterior.model), RandomFeatureHead)
    kind = "SNGP, a Gaussian process of random features" if is_sngp else "VBLL, a variational last layer"
    return {"method": f"the last layer is the posterior: {kind}"}


def _temperature(posterior: TemperaturePosterior) -> Facts:
    shown = f", T = {posterior.temperature:.4g}" if posterior.kind == "scalar" else ""
    return {**facts_of(posterior.base), "calibration": f"{posterior.kind}{shown}, fitted on held-out rows"}


def _mixture(posterior: MixturePosterior) -> Facts:
    weights = ", ".join(f"{weight:.3g}" for weight in posterior.weights)
    parts = {facts_of(part)["method"]: None for part in posterior.components}  # each kind once, in order
    return {"method": f"mixture of {len(posterior.components)} posteriors (weights {weights}): {'; '.join(parts)}"}


_DESCRIBED: dict[type[Any], Any] = {
    PointPosterior: _point,
    VariationalPosterior: _variational,
    LaplacePosterior: _laplace,
    EnsemblePosterior: _ensemble,
    SWAGPosterior: _swag,
    DropoutPosterior: _dropout,
    DiagonalPosterior: _diagonal,
    HeadPosterior: _head,
    TemperaturePosterior: _temperature,
    MixturePosterior: _mixture,
}


def _of_all(model: nn.Module) -> str:
    """Of how many distinct weights, without the scales of a conversion."""
    return f"of {sum(p.numel() for name, p in model.named_parameters() if not name.endswith('_rho')):,} weights"


def _noise(noise_std: Any) -> str:
    return "predicted by the model" if isinstance(noise_std, str) else f"{noise_std:.4g}, a standard deviation"


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).split())}`"
