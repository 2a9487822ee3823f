"""The weights of the families of parts, by unfamiliar inputs that are given or made up, never by those to be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from ..metrics import ood_auroc
from .density import Part

_STEPS = 4


def standardized(parts: Sequence[Part], familiar: Tensor) -> list[Part]:
    """Take mean and deviation of calibration rows' raw scores, (parts, n).

    Returns:
        The parts with these.

    Raises:
        ValueError: there are fewer than two rows, or they have one score.
    """
    if familiar.shape[1] < 2:
        raise ValueError(
            f"{familiar.shape[1]} rows are left to standardise the scores by, but 2 are needed: give more `validation` "
            "rows."
        )
    return [part.calibrated(row) for part, row in zip(parts, familiar, strict=True)]


def weighted(parts: Sequence[Part], familiar: Tensor, unfamiliar: Mapping[str, Tensor]) -> tuple[Part, ...]:
    """Weigh the families: parts of one method are one family, and count alike.

    Every family's sum is divided by its deviation over the calibration rows. Of the weights i/4 with sum 1 those are
    taken with the largest AUROC of telling unfamiliar from calibration rows, averaged over the kinds of unfamiliar
    ones; without any, the first family counts alone. The total too has deviation 1 over the calibration rows.

    Args:
        parts: standardised.
        familiar: raw scores of the calibration rows, (parts, n).
        unfamiliar: raw scores (parts, m) by kind.

    Returns:
        The parts that have a weight, with it.
    """
    methods = list(dict.fromkeys(part.method for part in parts))
    spreads = {method: float(_sums(parts, familiar, [method]).std(correction=0)) or 1.0 for method in methods}
    weights = {method: float(method == methods[0]) for method in methods}
    if unfamiliar and len(methods) > 1:
        others = [_sums(parts, raw, methods, spreads) for raw in unfamiliar.values()]
        weights = dict(zip(methods, _best(_sums(parts, familiar, methods, spreads), others), strict=True))
    kept = [
        replace(part, weight=weights[part.method] / spreads[part.method]) for part in parts if weights[part.method] > 0
    ]
    rows = torch.stack([row for part, row in zip(parts, familiar, strict=True) if weights[part.method] > 0])
    total = torch.stack([part.standardized(row) for part, row in zip(kept, rows, strict=True)]).sum(0)
    spread = float(total.std(correction=0)) or 1.0
    return tuple(replace(part, weight=part.weight / spread) for part in kept)


def _sums(
    parts: Sequence[Part], raw: Tensor, methods: Sequence[str], spreads: Mapping[str, float] | None = None
) -> Tensor:
    """Of every family, (families, n), or of the only one (n,)."""
    rows = [part.standardized(row) for part, row in zip(parts, raw, strict=True)]
    sums = [
        torch.stack([row for part, row in zip(parts, rows, strict=True) if part.method == method]).sum(0)
        / (1.0 if spreads is None else spreads[method])
        for method in methods
    ]
    return torch.stack(sums) if spreads is not None else sums[0]


def _best(familiar: Tensor, unfamiliar: Sequence[Tensor]) -> tuple[float, ...]:
    """The best weights of the grid; of equal ones the first, which trusts the first families more."""
    steps = range(_STEPS, -1, -1)
    grid = [weights for weights in product(steps, repeat=len(familiar)) if sum(weights) == _STEPS]
    values = [_mean_auroc(torch.tensor(weights, dtype=torch.float64), familiar, unfamiliar) for weights in grid]
    return tuple(step / _STEPS for step in grid[values.index(max(values))])


def _mean_auroc(weights: Tensor, familiar: Tensor, unfamiliar: Sequence[Tensor]) -> float:
    inside = weights @ familiar.double()
    found = []
    for rows in unfamiliar:
        scores = torch.cat([inside, weights @ rows.double()])
        found.append(ood_auroc(scores.numpy(), [0] * len(inside) + [1] * rows.shape[1]))
    return sum(found) / len(found)
