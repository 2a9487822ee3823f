"""KL to any prior that treats weights one by one, for large tensors: value and gradient block by block.

As `normal_kl.py`, but a block's gradient is autograd's: what it keeps on the way is of the size of a block, not of the
model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .normal_kl import blocks

BlockKL = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""KL of a block, a scalar, from its means, its rho and its centre: in the precision in which it is to be summed."""


def separable_kl(
    loc: Tensor, rho: Tensor, centre: Tensor | None, kl: BlockKL, padding_idx: int | None = None
) -> Tensor:
    """Sum of ``kl`` over the blocks of a tensor.

    Args:
        loc: means.
        rho: of their scales.
        centre: of the prior, passed on block by block; None where it is the mean itself or plays no part.
        kl: of a block; a sum over its weights.
        padding_idx: row that is not random: no part of the sum, gradient 0.

    Shape: ``loc``, ``rho``, ``centre`` alike -> a scalar of their widest dtype, once differentiable.
    """
    value: Tensor = _SeparableKL.apply(loc, rho, centre, kl, padding_idx)  # type: ignore[no-untyped-call]
    return value


class _SeparableKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, rho: Tensor, centre: Tensor | None, kl: BlockKL, padding_idx: int | None
    ) -> Tensor:
        value, grads = _value_and_grads(loc, rho, centre, kl, padding_idx, ctx.needs_input_grad)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None, None


def _value_and_grads(
    loc: Tensor, rho: Tensor, centre: Tensor | None, kl: BlockKL, padding_idx: int | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    dtype = torch.promote_types(torch.promote_types(loc.dtype, rho.dtype), torch.float32)
    grads = tuple(
        torch.zeros_like(value, memory_format=torch.contiguous_format) if want else None
        for value, want in zip((loc, rho), wanted, strict=False)
    )
    values = [torch.zeros((), dtype=dtype, device=rho.device)]
    for mu, r, m, *slots in blocks(padding_idx, loc, rho, centre, *grads):
        leaves = [x.to(dtype, copy=True).requires_grad_(want) for x, want in zip((mu, r), wanted, strict=False)]
        with torch.enable_grad():
            value = kl(leaves[0], leaves[1], None if m is None else m.to(dtype))
        pairs = [(leaf, slot) for leaf, slot in zip(leaves, slots, strict=True) if slot is not None]
        if pairs and value.requires_grad:
            found = torch.autograd.grad(value, [leaf for leaf, _ in pairs], allow_unused=True)
            for (_, slot), gradient in zip(pairs, found, strict=True):
                if gradient is not None:
                    slot.copy_(gradient)
        values.append(value.detach())
    return torch.stack(values).sum(dtype=torch.float64).to(dtype), grads
