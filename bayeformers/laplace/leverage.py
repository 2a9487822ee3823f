"""Leverages of training rows, and the smallest prior precision that keeps them below 1: tau without held-out labels.

In a posterior whose precision is the whole Gauss-Newton matrix, sum_n J_n^T H_n J_n + tau, the logits of a training row
have the leverage H^{1/2} J S J^T H^{1/2}, H the loss Hessian in the logits: below the identity for every tau > 0, as
S^-1 >= J^T H J + tau I. Of two classes its trace is one number, h v < 1; of more, the trace is asked to stay below 1
too, which is stricter than the bound of each direction and was measured to harm less. Kronecker factors break the bound
by orders of magnitude where tau is small, and there the logits' variances are wrong by as much. So the largest leverage
over training rows tells which tau are too small for this curvature, without a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset

from ..forward import call, rows, tensors_in
from ..likelihoods import Likelihood
from ..likelihoods.registry import likelihood_of_family
from ..linearized.captured import OutputOf, bare_tensors, covariance, linearize
from ..processes import num_processes
from ..sampling.random_state import preserved
from .data import Batch, Loader, prepare
from .posterior import LaplacePosterior

__all__ = ["items_apart", "leverages", "safe_precision", "training_rows"]

MAX_ROWS = 128
"""Training rows that are looked at, of all processes."""
MAX_DIRECTIONS = 4
"""Directions of an item's logits that are looked at: those in which its loss curves most."""
ROWS_OF_A_BATCH = 16
"""Rows of one batch, of a source whose rows have no numbers, where it has batches enough."""
MAX_TOKENS = 4
"""Tokens of a row that are looked at."""


def leverages(posterior: LaplacePosterior, batches: Iterable[Batch], grid: Sequence[float]) -> np.ndarray:
    """Return each item's leverage at each scalar prior precision, (n, items), of this process's rows.

    It is the trace of H^{1/2} J S J^T H^{1/2} / (T s^2), of all C - 1 directions of up to 5 classes; of more outputs
    over the 4 directions in which the loss curves most. Of a row of many items, 4 chosen at random.

    Args:
        posterior: at any prior precision.
        batches: training rows; labels, where there are any, tell which items have a loss term. Of `items_apart` where
            rows have many.
        grid: the prior precisions tau > 0.
    """
    blocks = posterior.blocks_at([float(tau) for tau in grid])
    likelihood = likelihood_of_family(posterior.record.config.likelihood)
    found = [np.empty((len(grid), 0))]
    with posterior.recording_view(bare_tensors(blocks)) as view:
        for batch in batches:
            labelled = batch.labelled(likelihood)
            if len(labelled):
                output_of = _steepest(posterior.outputs_of, likelihood, labelled)
                _, stacked = linearize(view, labelled.inputs, blocks, covariance, output_of)
                traces = stacked.double().diagonal(dim1=-2, dim2=-1).sum(-1).flatten(1)
                found.append(posterior.likelihood_precision * traces.cpu().numpy())
    return np.concatenate(found, axis=1)


def safe_precision(leverage: np.ndarray, grid: Sequence[float]) -> float:
    """The smallest tau at which no row's leverage exceeds 1, interpolated in the logarithms of both.

    Args:
        leverage: of `leverages`, (n, items); it falls with tau.
        grid: the n prior precisions, increasing.

    Returns:
        tau; the grid's first where no leverage exceeds 1 even there, and its last where one does at all.

    >>> safe_precision(np.array([[100.0, 3.0], [10.0, 0.3], [0.1, 0.03]]), [1.0, 10.0, 100.0])
    31.62...
    """
    largest = np.log(np.maximum(leverage.max(axis=1), np.finfo(float).tiny))
    above = np.flatnonzero(largest > 0)
    if len(above) == 0:
        return float(grid[0])
    last = int(above[-1])
    if last == len(grid) - 1:
        return float(grid[-1])
    share = largest[last] / (largest[last] - largest[last + 1])
    low, high = np.log(grid[last]), np.log(grid[last + 1])
    return float(np.exp(low + share * (high - low)))


def items_apart(posterior: LaplacePosterior, batches: Sequence[Batch]) -> list[Batch]:
    """The batches as they are; where rows have many items each, fewer rows, one at a time: each has its own places."""
    if not batches:
        return []
    with posterior.recording_view() as view, torch.no_grad():
        outputs = posterior.outputs_of(call(view.model, batches[0].inputs))
    if outputs.ndim < 3:
        return list(batches)
    return [row for batch in batches for row in batch.examples()][::MAX_TOKENS]


def training_rows(loader: Loader, seed: int = 0, num_rows: int = MAX_ROWS) -> list[Batch]:
    """Return batches of this process's share of ``num_rows`` random rows of its data.

    A `DataLoader` of a dataset gives them by their numbers, in the dataset's order; of any other source random batches
    are taken, and random rows of these: it is passed over once.

    Args:
        loader: the training data of this process.
        seed: of the choice.
        num_rows: of all processes.
    """
    count, generator = math.ceil(num_rows / num_processes()), torch.Generator().manual_seed(seed)
    source = loader.loader
    with preserved():  # a DataLoader takes its seed from the default generator
        if not _has_numbers(source):
            return _rows_of_batches(loader, count, generator)
        number = len(cast(Sized, source.dataset))
        chosen = torch.randperm(number, generator=generator)[:count].sort().values.tolist()
        few = DataLoader(Subset(source.dataset, chosen), source.batch_size, collate_fn=source.collate_fn)
        return [prepare(loader.model, batch, loader.device) for batch in few]


def _has_numbers(source: Any) -> TypeGuard[DataLoader[Any]]:
    """Whether every row of the dataset is one of the loader's."""
    return (
        type(source) is DataLoader
        and type(source.batch_sampler) is BatchSampler
        and type(source.sampler) in (SequentialSampler, RandomSampler)
    )


def _rows_of_batches(loader: Loader, count: int, generator: torch.Generator) -> list[Batch]:
    """Random rows of random batches (a reservoir, for how many there are is unknown), in the order of the pass."""
    kept: dict[int, Batch] = {}
    places = 0
    for number, batch in enumerate(loader.batches("Rows for leverages")):
        places = places or math.ceil(count / min(len(batch), ROWS_OF_A_BATCH))
        place = number if number < places else int(torch.randint(number + 1, (), generator=generator))
        if place < places:
            if number >= places:
                del kept[list(kept)[place]]
            kept[number] = _some(batch, count, generator)
    return [_some(batch, math.ceil(count / len(kept)), generator) for batch in kept.values()]


def _some(batch: Batch, count: int, generator: torch.Generator) -> Batch:
    size = len(batch)
    if size <= count:
        return batch
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:count]] = True
    mask = mask.to(next(tensors_in(batch.inputs)).device)
    labels = batch.labels
    labels = labels if labels is None or len(labels) != size else labels[mask]
    attended = None if batch.attended is None else batch.attended[mask]
    return Batch(rows(batch.inputs, mask, size), labels, attended, batch.has_padding)


def _steepest(outputs_of: OutputOf, likelihood: Likelihood, batch: Batch) -> OutputOf:
    """The logits' products with columns S, S S^T = H, (B, K) or (tokens, K): their covariance is the leverage."""

    def output_of(output: Any) -> Tensor:
        logits = outputs_of(output)
        if logits.ndim == 3:
            logits = logits[:, _chosen(logits, likelihood, batch)]
        columns = torch.stack([column.detach() for column in likelihood.hessian_columns(logits)], dim=-1)
        if columns.shape[-1] > MAX_DIRECTIONS:
            vectors, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
            columns = (vectors * values[..., None, :])[..., :MAX_DIRECTIONS].to(columns)
        return torch.einsum("...c,...ck->...k", logits, columns)

    return output_of


def _chosen(logits: Tensor, likelihood: Likelihood, batch: Batch) -> Tensor:
    """Positions of one row with a loss term, the same at every call: (tokens,)."""
    if batch.labels is not None:
        counts = likelihood.label_mask(logits, batch.labels).any(-1)[0]
    elif batch.attended is not None and batch.attended.shape == logits.shape[:2]:
        counts = batch.attended[0]
    else:
        counts = logits.new_ones(logits.shape[1], dtype=torch.bool)
    places = counts.nonzero().flatten()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    return places[order[:MAX_TOKENS].to(places.device)]
