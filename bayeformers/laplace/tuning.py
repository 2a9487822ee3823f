"""The prior precision and a regression's noise: given, of largest evidence, or chosen by held-out data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from ..likelihoods.registry import likelihood_of_family
from ..linearized.links import Link
from .choice import PrecisionChoice, by_evidence
from .evidence import Precision, optimal_precision_and_noise, optimal_prior_precision
from .holdout import checked_validation, grid_end, holdout_nll, holdout_precision
from .loading import Loader
from .posterior import LaplacePosterior

PriorChoice = Literal["marglik", "marglik_per_layer", "holdout"]


def default_choice(validation: object) -> PriorChoice:
    """How tau is found where nothing is said: by held-out data if there are any, else by the evidence."""
    return "marglik" if validation is None else "holdout"


def tune(
    posterior: LaplacePosterior,
    prior_precision: Precision | PriorChoice,
    *,
    noise_std: float | None = None,
    validation: Iterable[Any] | None = None,
    link: Link = "auto",
    progress: bool = True,
) -> LaplacePosterior:
    """The posterior at a prior precision (and noise) that is given, or found as `fit` says; no curvature is refitted.

    Raises:
        ValueError: as for `fit`.
    """
    choices = get_args(PriorChoice)
    if isinstance(prior_precision, str) and prior_precision not in choices:
        raise ValueError(f"`prior_precision` must be a number, or one of {choices}, got {prior_precision!r}.")
    record = posterior.record
    posterior = posterior if noise_std is None else posterior.with_noise_std(noise_std)
    spectra = posterior.spectra
    per_layer = prior_precision == "marglik_per_layer"
    finds_noise = (
        noise_std is None and likelihood_of_family(record.config.likelihood).has_noise and record.num_outputs > 0
    )
    if finds_noise and record.squared_error > 0:
        best, noise = optimal_precision_and_noise(
            spectra,
            squared_error=record.squared_error,
            num_outputs=record.num_outputs,
            per_layer=per_layer,
            temperature=posterior.temperature,
        )
        posterior = posterior.with_noise_std(noise)
    elif isinstance(prior_precision, str) and prior_precision != "holdout":
        best = optimal_prior_precision(spectra, per_layer=per_layer, scale=posterior.scale)
    if not isinstance(prior_precision, str):
        return posterior.with_prior_precision(prior_precision)
    if prior_precision == "holdout":
        validation = checked_validation(posterior.model, validation)
        held_out = Loader(posterior.model, validation, None, None, progress).batches("Held-out NLL")
        nll = holdout_nll(posterior, held_out, link=link)
        choice = PrecisionChoice(method="holdout", at_grid_end=grid_end(nll))
        return posterior.with_prior_precision(holdout_precision(nll), choice)
    return posterior.with_prior_precision(best, by_evidence(best, per_layer=per_layer))
