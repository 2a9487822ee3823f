"""Some rows of a Bayesian tensor as a tensor of their own, under the draw and the signs of the whole."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .variational import Draw, TensorSpec, Variational

Rows = slice | Tensor


def rows_of(whole: Variational, rows: Rows) -> Variational:
    """Rows of ``whole``: its means, scales and noise there, so that parts of one tensor go through an estimator alone.

    A padding row takes no noise, as in ``whole``, but keeps its variance: give it no weight.

    Args:
        whole: the tensor, (N, ...).
        rows: a slice of its first axis; or row numbers (n,), for a tensor with noise by row.
    """
    spec = replace(whole.spec, padding_idx=None)
    return Variational(_take(whole.loc, rows), _take(whole.rho, rows), spec, _RowsOfDraw(whole, rows), whole.floor)


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else F.embedding(rows, tensor)


class _RowsOfDraw(Draw):
    """What a draw gives for the whole tensor, at some of its rows."""

    def __init__(self, whole: Variational, which: Rows) -> None:
        self.whole, self.which = whole, which

    def noise(self, spec: TensorSpec, loc: Tensor) -> Tensor:
        """Of the rows; by row numbers it costs those rows."""
        draw, whole = self.whole.draw, self.whole
        if isinstance(self.which, slice):
            return draw.noise(whole.spec, whole.loc)[self.which]
        return draw._noise_of_rows(whole.spec, whole.loc, self.which)

    def weight(self, spec: TensorSpec, loc: Tensor, rho: Tensor, floor: Tensor | None = None) -> Tensor:
        """Of the rows."""
        return self.whole.sample()[self.which] if isinstance(self.which, slice) else self.whole.sample_rows(self.which)

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Of the rows on the first axis, of the whole tensor on any other."""
        if axis:
            return self.whole.draw.signs(self.whole.spec, axis, shape, device)
        return self.whole.draw.signs(self.whole.spec, 0, (shape[0], len(self.whole.loc)), device)[:, self.which]
