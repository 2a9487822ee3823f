"""Training rows that are perturbed, as held-out rows where there are none: tau without held-out labels.

A network knows its training rows, so their own likelihood does not tell how wrong it is elsewhere. It has not seen them
with 15 % of their words masked, or 15 % of their values taken from another row: their likelihood under their own labels
falls where the network memorised, and next to nothing where it was stopped early. A perturbed row is not a new one, and
a few hundred of them leave noise, so the choice is cautious: of all tau whose mean NLL lies within one standard error
of the least, the largest (the "one-standard-error rule", Breiman et al. 1984, CART, section 3.4.3). 15 % is the share
of BERT's masks (Devlin et al. 2019, arXiv 1810.04805, section 3.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import is_whole
from ..forward import Inputs, mapped, tensors_in, vocabulary_size
from .data import Batch

__all__ = ["TokenMask", "cautious_precision", "check_token_mask", "is_perturbable", "perturbed_rows"]

SHARE = 0.15
"""Of a row's words or values."""
MAX_ROWS = 256
"""Training rows that are perturbed, of all processes."""
IDS = "input_ids"


@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """How words are hidden from an encoder.

    Attributes:
        mask_token_id: the tokenizer's.
        kept: ids that are never masked: the special tokens.
    """

    mask_token_id: int
    kept: Collection[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name, ids in (("mask_token_id", [self.mask_token_id]), ("kept", self.kept)):
            wrong = [one for one in ids if not is_whole(one) or one < 0]
            if wrong:
                raise ValueError(f"`{name}` must be the ids of tokens, whole numbers >= 0, got {wrong[0]!r}.")


def check_token_mask(token_mask: Any, model: nn.Module) -> None:
    """Check that words can be masked so in this model.

    Args:
        token_mask: as of `laplace.fit`.
        model: that reads the words.

    Raises:
        TypeError: it is no `TokenMask`.
        ValueError: the model has no such token.
    """
    if not isinstance(token_mask, TokenMask | None):
        raise TypeError(f"`token_mask` must be a `laplace.TokenMask`, got {type(token_mask).__name__}.")
    size = None if token_mask is None else vocabulary_size(model)
    if token_mask is not None and size is not None and token_mask.mask_token_id >= size:
        raise ValueError(
            f"`token_mask` has the `mask_token_id` {token_mask.mask_token_id}, beyond the model's vocabulary of {size}."
        )


def is_perturbable(batch: Batch, likelihood: str, token_mask: TokenMask | None) -> bool:
    """Return whether perturbed rows can choose tau: of a classification with one label a row, of words or of values.

    Args:
        batch: of the training data.
        likelihood: of the model's head.
        token_mask: of a model that reads words.
    """
    if likelihood != "classification" or batch.labels is None or batch.labels.ndim != 1:
        return False
    if _has_words(batch.inputs):
        return token_mask is not None
    return any(_is_values(tensor) for tensor in tensors_in(_unmasked(batch.inputs)))


def masks_words(batches: Sequence[Batch]) -> bool:
    """Whether `perturbed_rows` masks words; else it exchanges values."""
    return bool(batches) and _has_words(batches[0].inputs)


def perturbed_rows(batches: Sequence[Batch], token_mask: TokenMask | None, seed: int = 0) -> list[Batch]:
    """Return the rows with `SHARE` of their words masked, or of their values as another row has them in that place.

    What is masked depends on the row and the seed alone, not on its batch. Values are exchanged between all rows where
    these are of one shape, else within a batch; a batch of one row then stays as it is.

    Args:
        batches: training rows.
        token_mask: of a model that reads words.
        seed: of the choice of words or values.
    """
    if masks_words(batches):
        assert token_mask is not None  # is_perturbable
        return [replace(batch, inputs=_masked(batch, token_mask, seed)) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    donors = _donors([list(tensors_in(_unmasked(batch.inputs))) for batch in batches])
    return [
        replace(batch, inputs=_with_masks(batch.inputs, _exchanged(_unmasked(batch.inputs), iter(others), generator)))
        for batch, others in zip(batches, donors, strict=True)
    ]


def cautious_precision(nll: np.ndarray, grid: Sequence[float]) -> float:
    """Return the largest tau whose mean NLL is at most one standard error of paired differences above the least.

    The standard error of a single row is unknown: the largest of all.

    Args:
        nll: of each row at each tau, (n, rows).
        grid: the n prior precisions, increasing.

    >>> cautious_precision(np.array([[0.5, 0.9], [0.2, 0.4], [0.1, 0.6], [0.9, 0.9]]), [1.0, 10.0, 100.0, 1000.0])
    100.0
    """
    if nll.shape[1] == 1:
        return float(grid[-1])
    changes = nll - nll[int(nll.mean(axis=1).argmin())]
    errors = changes.std(axis=1) / np.sqrt(nll.shape[1])
    return float(grid[int(np.flatnonzero(changes.mean(axis=1) <= errors)[-1])])


def _has_words(inputs: Inputs) -> bool:
    return isinstance(inputs, Mapping) and isinstance(inputs.get(IDS), Tensor)


def _unmasked(inputs: Inputs) -> Inputs:
    """Without masks, which may be floating-point numbers too, and are no values."""
    return {k: v for k, v in inputs.items() if "mask" not in k} if isinstance(inputs, Mapping) else inputs


def _with_masks(inputs: Inputs, changed: Inputs) -> Inputs:
    return {**inputs, **changed} if isinstance(inputs, Mapping) and isinstance(changed, Mapping) else changed


def _is_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor[0].numel() > 1


def _masked(batch: Batch, token_mask: TokenMask, seed: int) -> Inputs:
    assert isinstance(batch.inputs, Mapping)
    ids = batch.inputs[IDS].clone(memory_format=torch.contiguous_format)  # rows are views
    is_word = ~torch.isin(ids, torch.tensor(sorted(token_mask.kept), dtype=ids.dtype, device=ids.device))
    if batch.attended is not None:
        is_word &= batch.attended
    for row, words in zip(ids.flatten(1), is_word.flatten(1), strict=True):  # of multiple choice (B, choices, T)
        places = words.nonzero().flatten()
        drawn = torch.rand(len(places), generator=_generator(row[places], seed)) < SHARE
        row[places[drawn.to(places.device)]] = token_mask.mask_token_id
    return {**batch.inputs, IDS: ids}


def _generator(words: Tensor, seed: int) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}/{words.tolist()}".encode(), digest_size=4).digest()  # 32 bits, of a CPU generator
    return torch.Generator().manual_seed(int.from_bytes(key))


def _donors(batches: list[list[Tensor]]) -> list[list[Tensor]]:
    """Every tensor of every batch, each row in the place of the one before it."""
    sizes = [len(tensors[0]) for tensors in batches]
    if any([t.shape[1:] for t in tensors] != [t.shape[1:] for t in batches[0]] for tensors in batches):
        return [[tensor.roll(1, 0) for tensor in tensors] for tensors in batches]
    rolled = [torch.split(torch.cat(parts).roll(1, 0), sizes) for parts in zip(*batches, strict=True)]
    return [list(parts) for parts in zip(*rolled, strict=True)]


def _exchanged(inputs: Inputs, donors: Iterator[Tensor], generator: torch.Generator) -> Inputs:
    def exchanged(tensor: Tensor) -> Tensor:
        other = next(donors)
        if not _is_values(tensor):
            return tensor
        drawn = torch.rand(tensor.shape, generator=generator) < SHARE
        return torch.where(drawn.to(tensor.device), other, tensor)

    found: Inputs = mapped(inputs, exchanged)
    return found
