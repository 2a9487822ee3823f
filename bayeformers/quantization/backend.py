"""INT8 codes of a matrix, and the product of two such."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LIMIT = 127
"""Codes are symmetric, -127..127: -w has the code of w with its sign turned."""


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes and the step of each row: step = max |row| / 127, so that |matrix - step * codes| <= step / 2.

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
    """x W^T in INT8: the rows of x get codes of their own, the products are summed exactly in INT32.

    Shape: ``x`` (n, k); ``codes`` (m, k) and ``step`` (m,) of W -> float32 (n, m).
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
