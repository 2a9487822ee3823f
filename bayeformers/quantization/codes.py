"""INT8: the product of two matrices of codes, `Codes` for weights (evenly spaced), `ScaleCodes` for scales (in log)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 127
"""Codes are symmetric, -127..127: -w has the code of w with its sign turned."""


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return INT8 codes and the step of each row: step = max |row| / 127, so that |matrix - step * codes| <= step / 2.

    A row of zeros has the smallest normal number as its step. Values are read in float32.

    Shape: (n, k) -> int8 (n, k), float32 (n, 1).

    >>> codes, step = quantize_rows(torch.tensor([[0.5, -1.27], [0.0, 0.0]]))
    >>> codes.tolist(), step[0].item()
    ([[50, -127], [0, 0]], 0.01)
    """
    wide = matrix.detach().float()
    step = (wide.abs().amax(1, keepdim=True) / LIMIT).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / step).round_().to(torch.int8), step


def int8_product(x: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """Return x W^T in INT8: the rows of x get codes of their own, the products are summed exactly in INT32.

    Args:
        x: (n, k), in float, which becomes INT8 row by row.
        codes: int8 (m, k), of W.
        step: float32 (m,), of the rows of W.

    Returns:
        The product, float32 (n, m).
    """
    rows, scale = quantize_rows(x)
    if has_exact_product():
        return torch._int_mm(rows, codes.t()) * scale * step
    return (rows.float() @ codes.float().t()) * scale * step


@functools.cache
def has_exact_product() -> bool:
    """Whether this processor's INT8 product is right for the largest codes: older ones may saturate at 16 bits."""
    largest = torch.full((64, 256), LIMIT, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) == 256 * LIMIT**2).all())


LOG_RANGE = math.log(1e4)
"""Of a mean-field channel's scales: those below a ten-thousandth of the largest do not matter, and are raised to it."""


@dataclass(frozen=True, eq=False)
class Codes:
    """w = step * codes, with one step per channel: |error| <= step / 2, half of max |channel| / 127.

    Attributes:
        codes: int8, the shape of the tensor.
        step: float32, of size 1 on all axes but the channels'.

    >>> coded = Codes.of(torch.tensor([[0.5, -1.27], [0.0, 3.81]]))
    >>> coded.dequantize()
    tensor([[ 0.5000, -1.2700],
            [ 0.0000,  3.8100]])
    """

    codes: Tensor
    step: Tensor

    @classmethod
    def of(cls, tensor: Tensor, axis: int = 0) -> Self:
        """``axis`` is that of the channels."""
        moved = tensor.movedim(axis, 0)
        codes, step = quantize_rows(moved.reshape(len(moved), -1))
        shape = [1] * tensor.dim()
        shape[axis] = tensor.shape[axis]
        return cls(codes.reshape(moved.shape).movedim(0, axis).contiguous(), step.reshape(shape))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor, rounded once to ``dtype``."""
        return (self.codes * self.step).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table with one step per row: (*,) -> (*, width), float32."""
        return F.embedding(ids, self.codes) * F.embedding(ids, self.step)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and steps."""
        return self.codes.nbytes + self.step.nbytes


@dataclass(frozen=True, eq=False)
class ScaleCodes:
    """sigma = top * exp(-step * (127 - code)), per channel: a relative error of at most exp(step / 2) - 1 for each.

    Evenly spaced codes would give a small sigma a large relative error, and sigma spans orders of magnitude, as |w|
    does; of a ten-thousandfold range the error is at most 1.9 %, about 1 % in the mean square. Code -128 means 0.

    Attributes:
        codes: int8, the shape of the tensor.
        top: float32, the largest of each channel.
        step: float32, the log of the ratio of neighbours.

    >>> ScaleCodes.of(torch.tensor([[1.0, 0.0, 1e-3]])).dequantize()
    tensor([[1.0000, 0.0000, 0.0010]])
    """

    codes: Tensor
    top: Tensor
    step: Tensor

    @classmethod
    def of(cls, scale: Tensor, axis: int = 0, log_range: float = LOG_RANGE) -> Self:
        """Return the codes of standard deviations.

        Args:
            scale: standard deviations >= 0, of any shape.
            axis: of the channels, each of which has a ``top`` and a ``step``.
            log_range: scales below exp(-log_range) of the channel's largest are raised to that; by default log 10^4.
        """
        wide = scale.detach().float()
        others = [other for other in range(wide.dim()) if other != axis % wide.dim()]
        log = wide.log()
        top = log.amax(others, keepdim=True)
        low = log.masked_fill(wide == 0, torch.inf).amin(others, keepdim=True)
        top, low = (bound.where(bound.isfinite(), 0.0) for bound in (top, low))
        step = (top - low).clamp_max(log_range) / (2 * LIMIT)
        steps = ((top - log) / step.clamp_min(torch.finfo(torch.float32).tiny)).where(log < top, 0.0)
        codes = (LIMIT - steps.clamp_max(2 * LIMIT).round()).where(wide > 0, -LIMIT - 1)
        return cls(codes.to(torch.int8), top.exp().where(wide.amax(others, keepdim=True) > 0, 0.0), step)

    def dequantize(self) -> Tensor:
        """The standard deviations, float32."""
        return _scale(self.codes, self.top, self.step)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table with one channel per row: (*,) -> (*, width), float32."""
        return _scale(*(F.embedding(ids, part) for part in (self.codes, self.top, self.step)))

    @property
    def nbytes(self) -> int:
        """Bytes of codes, tops and steps."""
        return self.codes.nbytes + self.top.nbytes + self.step.nbytes


def _scale(codes: Tensor, top: Tensor, step: Tensor) -> Tensor:
    found = (codes.float() - LIMIT).mul_(step).exp_().mul_(top)
    return found.masked_fill_(codes == -LIMIT - 1, 0.0)
