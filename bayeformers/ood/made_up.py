"""Made-up unfamiliar inputs, from rows that are familiar: by them weights are chosen without any unfamiliar text.

Three kinds, all of token ids; each keeps the tokens that nearly every row has ([CLS], [SEP], a full stop) in place:

* "shuffled": a row's other tokens in another order;
* "replaced": every other token drawn from those of all rows;
* "mixed": the second half of a row's other tokens taken from another row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..forward import Inputs, attended_positions

KINDS = ("shuffled", "replaced", "mixed")
_COMMON = 0.95
"""Share of rows that a token must be in to stay in place."""


def can_be_made_up(inputs: Inputs) -> bool:
    """Whether the inputs are token ids (B, T)."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()


def made_up(batches: Sequence[Inputs], kind: str, seed: int) -> list[Inputs]:
    """Return batches of unfamiliar inputs, of the same shapes.

    Args:
        batches: of familiar ones, for which `can_be_made_up`.
        kind: one of `KINDS`.
        seed: of the draws.

    >>> ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 4, 2]])
    >>> [batch] = made_up([{"input_ids": ids}], "mixed", 0)
    >>> batch["input_ids"]
    tensor([[1, 5, 6, 4, 2],
            [1, 8, 9, 7, 2]])
    """
    generator = torch.Generator().manual_seed(seed)
    given: list[Any] = list(batches)
    free = _free_positions(given)
    rows = [
        ids[where]
        for batch, mask in zip(given, free, strict=True)
        for ids, where in zip(_ids(batch), mask, strict=True)
    ]
    pool, number = torch.cat(rows), 0
    found: list[Inputs] = []
    for batch, mask in zip(given, free, strict=True):
        ids = _ids(batch).clone()
        for row, where in zip(ids, mask, strict=True):
            row[where] = _changed(rows, number, pool, kind, generator)
            number += 1
        found.append({**batch, "input_ids": ids.to(batch["input_ids"].device)})
    return found


def _changed(rows: Sequence[Tensor], number: int, pool: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    own = rows[number]
    if kind == "shuffled":
        return own[torch.randperm(len(own), generator=generator)]
    if kind == "replaced":
        return pool[torch.randint(len(pool), (len(own),), generator=generator)] if len(pool) else own
    step = int(torch.randint(1, max(2, len(rows)), (1,), generator=generator))
    other, half = rows[(number + step) % len(rows)], len(own) - len(own) // 2
    tail = other[max(0, len(other) - (len(own) - half)) :]
    return torch.cat([own[: len(own) - len(tail)], tail])


def _ids(batch: Mapping[str, Any]) -> Tensor:
    ids: Tensor = batch["input_ids"]
    return ids.cpu()


def _free_positions(batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Where tokens may be changed: attended, and not of those that nearly every row has."""
    attended = []
    for batch in batches:
        mask = attended_positions(batch, batch["input_ids"].shape[1])
        attended.append(torch.ones_like(_ids(batch), dtype=torch.bool) if mask is None else mask.cpu())
    pairs = list(zip(batches, attended, strict=True))
    in_rows = [torch.unique(ids[where]) for batch, mask in pairs for ids, where in zip(_ids(batch), mask, strict=True)]
    tokens, counts = torch.unique(torch.cat(in_rows), return_counts=True)
    common = tokens[counts >= _COMMON * sum(len(mask) for mask in attended)]
    return [mask & ~torch.isin(_ids(batch), common) for batch, mask in pairs]
