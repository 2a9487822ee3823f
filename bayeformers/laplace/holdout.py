"""The prior precision of least held-out NLL, for the predictive that will be used; one pass serves the whole grid."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..likelihoods import get_likelihood
from ..linearized.captured import bare_tensors, covariance, linearize
from ..linearized.links import Link, ignores_shift, linearized_predictive
from ..posteriors.heads import has_many_logits, known_problem_type
from ..processes import process_index, summed
from .choice import End, end_of
from .data import Batch
from .posterior import LaplacePosterior

T = TypeVar("T")

logger = logging.getLogger(__name__)

GRID: tuple[float, ...] = tuple(np.logspace(-4, 6, 21).tolist())
"""Two values per decade; a parabola refines the best."""


def checked_validation(model: nn.Module, validation: T | None) -> T:
    """Held-out data as they are, of a model whose predictive can be linearised.

    Raises:
        ValueError: ``validation`` is None, or the head has too many logits.
    """
    if validation is None:
        raise ValueError('`prior_precision`="holdout" needs `validation`: held-out batches with labels.')
    if has_many_logits(model, known_problem_type(model)):
        raise ValueError(
            '`prior_precision`="holdout" judges the linearised predictive, for which this head has too many logits: '
            'use "marglik", or give a number.'
        )
    return validation


def holdout_nll(
    posterior: LaplacePosterior,
    batches: Iterable[Batch],
    grid: tuple[float, ...] = GRID,
    *,
    link: Link = "auto",
    seed: int = 0,
) -> dict[float, float]:
    """Mean NLL per label of the linearised predictive ("glm") at each scalar prior precision, over all processes.

    Raises:
        ValueError: no labels.
    """
    blocks, problem = posterior.blocks_at(list(grid)), posterior.problem_type()
    likelihood = get_likelihood(problem)
    contrasts = ignores_shift(problem, link)
    totals, count = np.zeros(len(grid)), 0
    for batch in batches:
        if batch.labels is None:
            raise ValueError('`validation` needs labels for `prior_precision`="holdout".')
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
        problem = "token_classification" if mean.ndim == 3 else problem  # labels are aligned with the outputs
        values = mean.squeeze(-1) if likelihood.has_noise and mean.shape[-1] == 1 else mean
        labels = batch.labels.reshape(values.shape) if likelihood.has_noise else batch.labels
        for number, matrix in enumerate(stacked):
            predictive = linearized_predictive(
                mean, matrix, problem, link=link, seed=seed, noise_std=posterior.noise_std
            )
            found = predictive.log_prob(labels)
            kept = found[~found.isnan()]
            totals[number] -= float(kept.double().sum())
        count += kept.numel()
    sums = summed(torch.tensor([*totals, count], dtype=torch.float64)).tolist()
    if sums[-1] == 0:
        raise ValueError("`validation` holds no labelled example.")
    return dict(zip(grid, (total / sums[-1] for total in sums[:-1]), strict=True))


def grid_end(nll: dict[float, float]) -> End | None:
    """The end of the grid where the least NLL lies, else None."""
    taus = list(nll)
    best = int(np.nanargmin(list(nll.values())))
    return end_of([taus[best]], taus[0], taus[-1])


def holdout_precision(nll: dict[float, float]) -> float:
    """The minimum, refined by the parabola through it and its neighbours in log tau; a warning at the grid's end."""
    grid, values = np.log(list(nll)), np.array(list(nll.values()))
    best = int(np.nanargmin(values))
    if grid_end(nll) is not None:
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
