"""Eigenvectors in 8 and 16 bits: the sharp ones precisely, the flat ones coarsely but orthogonal to the sharp ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .codes import Codes

SHARP = 0.125
_FINE = 2**15 - 1
_PARTS = ("sharp", "sharp_step", "flat", "flat_step", "order")


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal columns u_i of K matrices, of which those of large curvature are called sharp.

    A posterior has its largest variance where the data say nothing. An error in such a flat direction that points along
    a sharp one would carry that variance to where the output feels it, so it is taken out: flat columns have INT8 codes
    and, when read, lose their components along the sharp ones, which are stored in INT16.

    Attributes:
        sharp: int16, (K, d, k).
        sharp_step: float32, (K, 1, k).
        flat: int8, (K, d, d - k).
        flat_step: float32, (K, 1, d - k).
        order: where each stored column belongs, int32 (K, d).
    """

    sharp: Tensor
    sharp_step: Tensor
    flat: Tensor
    flat_step: Tensor
    order: Tensor

    @classmethod
    def of(cls, vectors: Tensor, curvature: Tensor) -> Self:
        """Shape: ``vectors`` (K, d, d), by column; ``curvature`` (K, d)."""
        order = curvature.argsort(dim=-1, descending=True)
        sorted_ = vectors.detach().float().gather(-1, order[:, None].expand_as(vectors))
        count = max(1, round(SHARP * vectors.shape[-1]))
        sharp, flat = sorted_[..., :count], sorted_[..., count:]
        step = sharp.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _FINE
        coded = [Codes.of(block, axis=1) for block in flat] if flat.shape[-1] else []
        codes = torch.stack([one.codes for one in coded]) if coded else flat.to(torch.int8)
        steps = torch.stack([one.step for one in coded]) if coded else flat[:, :1]
        return cls((sharp / step).round().to(torch.int16), step, codes, steps, order.to(torch.int32))

    def matrix(self) -> Tensor:
        """The columns in their places, (K, d, d), float32."""
        sharp = self.sharp * self.sharp_step
        flat = self.flat * self.flat_step
        stored = torch.cat([sharp, flat - sharp @ (sharp.mT @ flat)], dim=-1)
        places = self.order.long()[:, None].expand_as(stored)
        return torch.empty_like(stored).scatter_(-1, places, stored)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What is stored."""
        return {f"{prefix}/{part}": getattr(self, part) for part in _PARTS}

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self | None:
        """What `tensors` gave; None where the basis was the identity."""
        if f"{prefix}/sharp" not in tensors:
            return None
        return cls(*(tensors[f"{prefix}/{part}"] for part in _PARTS))
