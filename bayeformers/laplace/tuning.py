"""The prior precision and a regression's noise: given, of largest evidence, or by rows' NLL or leverages.

One pass over the held-out data, or over some training rows, serves the whole grid of precisions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..likelihoods import get_likelihood
from ..likelihoods.registry import likelihood_of_family
from ..linearized.captured import bare_tensors, covariance, linearize
from ..linearized.links import Link, ignores_shift, linearized_predictive
from ..posteriors.heads import has_many_logits, known_problem_type
from ..processes import gathered, process_index, summed
from .config import PriorChoice, check_precision_choice
from .data import Batch, Loader
from .evidence import DEFAULT_BOUNDS, Precision, optimal_precision_and_noise, optimal_prior_precision
from .leverage import items_apart, leverages, safe_precision, training_rows
from .perturbed import MAX_ROWS, TokenMask, cautious_precision, is_perturbable, masks_words, perturbed_rows
from .posterior import End, LaplacePosterior, PrecisionChoice

T = TypeVar("T")

logger = logging.getLogger(__name__)

QUANTILES = {True: 0.95, False: 1.0}
"""Of the leverages that bound the tau of perturbed rows from below: of masked words, and of exchanged values."""
GRID: tuple[float, ...] = tuple(np.logspace(-4, 6, 21).tolist())
"""Two values per decade; a parabola refines the best."""


def default_choice(model: nn.Module, validation: object, training: object) -> PriorChoice:
    """Return how tau is found where nothing is said: by held-out rows, else leverages of training rows, else evidence.

    Args:
        model: whose head may have too many logits for leverages.
        validation: held-out data, or None.
        training: the training data, or None where they are not at hand.
    """
    if validation is not None:
        return "holdout"
    return "marglik" if training is None or has_many_logits(model, known_problem_type(model)) else "leverage"


def tune(
    posterior: LaplacePosterior,
    prior_precision: Precision | PriorChoice,
    *,
    noise_std: float | None = None,
    validation: Iterable[Any] | None = None,
    training: Iterable[Any] | Loader | None = None,
    token_mask: TokenMask | None = None,
    link: Link = "auto",
    progress: bool = True,
) -> LaplacePosterior:
    """Return the posterior at a prior precision (and noise) that is given, or found as `fit` says.

    No curvature is refitted. "leverage" takes the tau of largest evidence, but no smaller a one than keeps the leverage
    of each of some 128 random training rows below 1, as it would be if the curvature were not approximated: see
    `laplace.leverage`. No label is read. "perturbed" takes the largest tau that is as good as the best, up to one
    standard error, on some 256 random training rows with 15 % of their words masked or values exchanged, under their
    own labels, and no smaller one than the evidence and the leverages allow: see `laplace.perturbed`.

    Args:
        posterior: at any prior precision.
        prior_precision: tau, one per layer name, or how to find it.
        noise_std: s of a regression; by default the one of largest evidence.
        validation: held-out batches with labels, of "holdout".
        training: the data of the fit, of "leverage" and "perturbed", as `fit` takes them.
        token_mask: of "perturbed", for a model that reads words.
        link: of the predictive that "holdout" and "perturbed" judge.
        progress: whether to show a progress bar.
    """
    check_precision_choice(prior_precision)
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
        best = optimal_prior_precision(spectra, per_layer=per_layer, scale=posterior.likelihood_precision)
    if not isinstance(prior_precision, str):
        return posterior.with_prior_precision(prior_precision)
    if prior_precision == "holdout":
        validation = checked_validation(posterior.model, validation)
        held_out = Loader(posterior.model, validation, None, None, progress).batches("Held-out NLL")
        nll = holdout_nll(posterior, held_out, link=link)
        choice = PrecisionChoice(method="holdout", at_grid_end=_grid_end(nll))
        return posterior.with_prior_precision(holdout_precision(nll), choice)
    end = _end_of(list(best.values()) if isinstance(best, Mapping) else [best], *DEFAULT_BOUNDS)
    evidence = posterior.with_prior_precision(best, PrecisionChoice(method=prior_precision, at_grid_end=end))
    if prior_precision not in ("leverage", "perturbed"):
        return evidence
    checked_rows(posterior.model, prior_precision, training)
    loader = training if isinstance(training, Loader) else Loader(posterior.model, training or (), None, None, False)
    return _raised(evidence, loader) if prior_precision == "leverage" else _cautious(evidence, loader, token_mask, link)


def _cautious(
    posterior: LaplacePosterior, loader: Loader, token_mask: TokenMask | None, link: Link
) -> LaplacePosterior:
    """The posterior at the largest tau that is as good as the best on perturbed training rows, or at the bound's."""
    rows = [batch for batch in training_rows(loader, num_rows=MAX_ROWS) if len(batch)]
    check_perturbable(rows, posterior.record.config.likelihood, token_mask)
    quantile = QUANTILES[masks_words(rows)]  # before any row is left out: the same in every process
    likelihood = likelihood_of_family(posterior.record.config.likelihood)
    rows = [one for one in (batch.labelled(likelihood) for batch in rows) if len(one)]
    bound = float(_raised(posterior, loader, quantile).prior_precision)  # type: ignore[arg-type]
    grid = (bound, *(tau for tau in GRID if tau > bound))
    found = [np.empty((len(grid), 0))]
    found += [row_nll(posterior, batch, grid, link=link).numpy() for batch in perturbed_rows(rows, token_mask)]
    nll = np.concatenate(gathered(np.concatenate(found, axis=1)), axis=1)
    tau = cautious_precision(nll, grid)
    end: End | None = "largest" if tau == grid[-1] else None
    choice = PrecisionChoice(method="perturbed", at_grid_end=end, num_rows=nll.shape[1])
    return posterior.with_prior_precision(tau, choice)


def check_perturbable(rows: Sequence[Batch], likelihood: str, token_mask: TokenMask | None) -> None:
    """Raise ValueError where `prior_precision`="perturbed" cannot choose: see `perturbed.is_perturbable`."""
    if not rows or not is_perturbable(rows[0], likelihood, token_mask):
        raise ValueError(
            '`prior_precision`="perturbed" needs training rows of a classification with one label each, and words with '
            'a `token_mask` (in a Trainer: a tokenizer that has a mask token) or floating-point values: use "leverage".'
        )


def _raised(posterior: LaplacePosterior, loader: Loader, quantile: float = 1.0) -> LaplacePosterior:
    """The posterior at its own tau, or at the least that the leverages of training rows allow if that is larger."""
    rows = items_apart(posterior, training_rows(loader))
    evidence = float(posterior.prior_precision)  # type: ignore[arg-type]
    grid = (evidence, *(tau for tau in GRID[::2] if tau > evidence))  # a smaller tau than the evidence's is never taken
    found = np.concatenate(gathered(leverages(posterior, rows, grid)), axis=1)
    likelihood = likelihood_of_family(posterior.record.config.likelihood)
    count = sum(gathered(sum(len(batch.labelled(likelihood)) for batch in rows)))
    if found.shape[1] == 0:
        raise ValueError('`training` holds no row with a loss term for `prior_precision`="leverage".')
    found = np.quantile(found, quantile, axis=1)[:, None]
    tau = safe_precision(found, grid)
    is_unsafe = bool(found[-1].max() > 1)
    end = "largest" if is_unsafe else None if tau > evidence else posterior.choice.at_grid_end
    if is_unsafe and process_index() == 0:
        logger.warning(
            "No tau up to %.4g keeps the leverages of the training rows below 1: nothing safe is known, and the "
            "posterior stays next to the trained network.",
            grid[-1],
        )
    choice = PrecisionChoice(method="leverage", at_grid_end=end, num_rows=count)
    return posterior.with_prior_precision(tau, choice)


def checked_validation(model: nn.Module, validation: T | None) -> T:
    """Return held-out data as they are, of a model whose predictive can be linearised.

    Raises:
        ValueError: ``validation`` is None, or the head has too many logits.
    """
    return checked_rows(model, "holdout", validation)


def checked_rows(model: nn.Module, choice: PriorChoice, rows: T | None) -> T:
    """Return the rows of a way to find tau as they are, of a model whose predictive can be linearised.

    Args:
        model: the trained model.
        choice: "holdout", "leverage" or "perturbed".
        rows: the data that it needs.

    Raises:
        ValueError: ``rows`` is None, or the head has too many logits.
    """
    if rows is None:
        needs = (
            "`validation`: held-out batches with labels" if choice == "holdout" else "`training`: the data of the fit"
        )
        raise ValueError(f'`prior_precision`="{choice}" needs {needs}.')
    if has_many_logits(model, known_problem_type(model)):
        raise ValueError(
            f'`prior_precision`="{choice}" judges the linearised predictive, for which this head has too many logits: '
            'use "marglik", or give a number.'
        )
    return rows


def holdout_nll(
    posterior: LaplacePosterior,
    batches: Iterable[Batch],
    grid: tuple[float, ...] = GRID,
    *,
    link: Link = "auto",
    seed: int = 0,
) -> dict[float, float]:
    """Return the mean NLL per label of the linearised predictive at each scalar prior precision, over all processes.

    Args:
        posterior: the posterior at any prior precision.
        batches: this process's held-out batches, with labels.
        grid: the prior precisions tau > 0 to judge.
        link: from Gaussian logits to probabilities: see `linearized.links`.
        seed: the seed of the logit draws that some links take.

    Raises:
        ValueError: there are no labels.
    """
    totals, count = np.zeros(len(grid)), 0
    for batch in batches:
        if batch.labels is None:
            raise ValueError('`validation` needs labels for `prior_precision`="holdout".')
        found = row_nll(posterior, batch, grid, link=link, seed=seed)
        totals += found.sum(1).numpy()
        count += found.shape[1]
    sums = summed(torch.tensor([*totals, count], dtype=torch.float64)).tolist()
    if sums[-1] == 0:
        raise ValueError("`validation` holds no labelled example.")
    return dict(zip(grid, (total / sums[-1] for total in sums[:-1]), strict=True))


def row_nll(
    posterior: LaplacePosterior, batch: Batch, grid: Sequence[float], *, link: Link = "auto", seed: int = 0
) -> Tensor:
    """Return the NLL of each label of a batch in the linearised predictive, (n, labels), float64; not of ignored ones.

    Args:
        posterior: the posterior at any prior precision.
        batch: with labels.
        grid: the n scalar prior precisions to judge.
        link: from Gaussian logits to probabilities: see `linearized.links`.
        seed: the seed of the logit draws that some links take.
    """
    blocks, problem = posterior.blocks_at([float(tau) for tau in grid]), posterior.problem_type()
    likelihood, contrasts = get_likelihood(problem), ignores_shift(problem, link)
    with posterior.recording_view(bare_tensors(blocks)) as view:
        mean, stacked = linearize(
            view,
            batch.inputs,
            blocks,
            covariance,
            posterior.outputs_of,
            contrasts=contrasts,
            of_softmax=likelihood.ignores_shift,
        )
    assert batch.labels is not None  # the callers'
    problem = "token_classification" if mean.ndim == 3 else problem  # labels are aligned with the outputs
    values = mean.squeeze(-1) if likelihood.has_noise and mean.shape[-1] == 1 else mean
    labels = batch.labels.reshape(values.shape) if likelihood.has_noise else batch.labels
    found = []
    for matrix in stacked:
        predictive = linearized_predictive(mean, matrix, problem, link=link, seed=seed, noise_std=posterior.noise_std)
        log_prob = predictive.log_prob(labels)
        found.append(-log_prob[~log_prob.isnan()].flatten().double().cpu())
    return torch.stack(found)


def _grid_end(nll: dict[float, float]) -> End | None:
    """The end of the grid where the least NLL lies, else None."""
    taus = list(nll)
    return _end_of([taus[int(np.nanargmin(list(nll.values())))]], taus[0], taus[-1])


def holdout_precision(nll: dict[float, float]) -> float:
    """The minimum, refined by the parabola through it and its neighbours in log tau; a warning at the grid's end."""
    grid, values = np.log(list(nll)), np.array(list(nll.values()))
    best = int(np.nanargmin(values))
    if _grid_end(nll) is not None:
        found = float(list(nll)[best])
        if process_index() == 0:
            side = "smallest: the widest posterior" if best == 0 else "largest: next to no posterior at all"
            logger.warning(
                'prior_precision="holdout" found the least NLL at the end of its grid, tau = %.4g (the %s), and the '
                "true minimum may lie beyond. A validation set that is small or unlike the training data does this; "
                'compare "marglik", or give a number.',
                found,
                side,
            )
        return found
    low, middle, high = values[best - 1 : best + 2]
    curvature = low - 2 * middle + high
    shift = 0.5 * (low - high) / curvature if curvature > 0 else 0.0
    return float(np.exp(grid[best] + shift * (grid[best + 1] - grid[best])))


def _end_of(values: Sequence[float], low: float, high: float) -> End | None:
    """Which end of [low, high] one of the values has reached, if any; the smallest first."""
    if min(values) <= low:
        return "smallest"
    return "largest" if max(values) >= high else None
