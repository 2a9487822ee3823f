"""KL of large tensors: value and gradient in one pass over cache-sized blocks.

The plain expressions of `kl.py` write a dozen tensors of the size of the model to memory in every step; these read rho
once and write its gradient once. Both are the same formula, and tests hold them to each other. Between Gaussians the
gradient is written out; to any other prior that treats weights one by one, a block's is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .diagonal_normal import LINEAR_FROM, MIN_SCALE, DiagonalNormal, unit_of

BlockKL = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""KL of a block, a scalar, from its means, its rho and its centre: in the precision in which it is to be summed."""
PriorOfBlock = Callable[[Tensor], DiagonalNormal]
"""The prior of a block of weights, given the block of trained weights (or of means, where they are frozen)."""

_CPU_BLOCK = 2**16  # two threads' smallest share; all that is computed on the way stays in cache
_DEVICE_BLOCK = 2**24  # elsewhere kernel launches cost more than memory traffic


def normal_kl(
    loc: Tensor,
    rho: Tensor,
    centre: Tensor | None,
    prior: PriorOfBlock,
    padding_idx: int | None = None,
    *,
    prior_scale: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return the sum of log(s / sigma) + (sigma^2 + (mu - m)^2) / (2 s^2) - 1/2, sigma = max(softplus(rho), MIN_SCALE).

    Args:
        loc: means mu.
        rho: of their scales.
        centre: trained weights, passed to ``prior`` block by block; None where the frozen means are their own centre,
            m = mu, and the quadratic term is zero.
        prior: gives N(m, s^2) of a block.
        padding_idx: row that is not random: no part of the sum, gradient 0.
        prior_scale: s of every weight, with m = ``centre``, in place of ``prior``.
        floor: of a multiplicative scale, sigma = max(softplus(rho), MIN_SCALE) * max(|mu|, floor); None: additive.

    Shape: ``loc``, ``rho``, ``centre`` alike -> a scalar of their widest dtype, once differentiable.
    """
    value: Tensor = _NormalKL.apply(loc, rho, centre, prior, padding_idx, prior_scale, floor)  # type: ignore[no-untyped-call]
    return value


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loc: Tensor,
        rho: Tensor,
        centre: Tensor | None,
        prior: PriorOfBlock,
        padding_idx: int | None,
        prior_scale: Tensor | None,
        floor: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(loc, rho, centre, prior_scale, floor)
        ctx.rest = prior, padding_idx, ctx.needs_input_grad
        value, ctx.grads = _normal_value_and_grads(loc, rho, centre, prior_scale, floor, *ctx.rest)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # a second backward through the same graph: the first one gave its buffers away
            _, grads = _normal_value_and_grads(*ctx.saved_tensors, *ctx.rest)
        return *(None if g is None else g.mul_(grad) for g in grads), None, None, None, None, None


def _normal_value_and_grads(
    loc: Tensor,
    rho: Tensor,
    centre: Tensor | None,
    prior_scale: Tensor | None,
    floor: Tensor | None,
    prior: PriorOfBlock,
    padding_idx: int | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    dtype = torch.promote_types(torch.promote_types(loc.dtype, rho.dtype), torch.float32)
    grads = tuple(
        torch.empty_like(value, memory_format=torch.contiguous_format) if want else None
        for value, want in zip((loc, rho), wanted, strict=False)
    )
    values = [torch.zeros((), dtype=dtype, device=rho.device)]
    for mu, r, m, s, grad_mu, grad_r in blocks(padding_idx, loc, rho, centre, prior_scale, *grads):
        p = prior((mu if m is None else m).to(dtype)) if s is None else DiagonalNormal(m.to(dtype), s.to(dtype))
        exp_rho, scale = _softplus(r.to(dtype))
        ratio = scale / p.scale if floor is None else scale * unit_of(mu.to(dtype), floor) / p.scale
        values.append(-ratio.log().sum())
        excess = ratio.square_().sub_(1)  # summed element by element: near 0 where posterior and prior agree
        values.append(0.5 * excess.sum())
        if m is not None:
            shift = (mu.to(dtype) - p.loc).div_(p.scale)
            values.append(0.5 * shift.square().sum())
            if grad_mu is not None:
                grad_mu.copy_(shift.div_(p.scale))
        elif grad_mu is not None:
            grad_mu.zero_()
        if floor is not None and grad_mu is not None:  # d log sigma / d mu = 1 / mu, and 0 on the floor
            grad_mu.add_(torch.where(mu.abs() > floor, excess / mu.to(dtype), 0.0))
        if grad_r is not None:  # d/d rho = (ratio^2 - 1) / softplus * sigmoid(rho), `scale_slope`
            slope = exp_rho.div_(exp_rho + 1).clamp_min_(MIN_SCALE)
            grad_r.copy_(excess.div_(scale).mul_(slope))
    return torch.stack(values).sum(dtype=torch.float64).to(dtype), grads


def separable_kl(
    loc: Tensor, rho: Tensor, centre: Tensor | None, kl: BlockKL, padding_idx: int | None = None
) -> Tensor:
    """Return the sum of ``kl`` over the blocks of a tensor.

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
        value, grads = _separable_value_and_grads(loc, rho, centre, kl, padding_idx, ctx.needs_input_grad)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None, None


def _separable_value_and_grads(
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


def block_size(*tensors: Tensor | None) -> int:
    """Elements to work on at a time where these tensors lie."""
    return _CPU_BLOCK if all(t is None or t.device.type == "cpu" for t in tensors) else _DEVICE_BLOCK


def _softplus(rho: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(rho), scale), as `scale_from_rho`; the exponential stops at exp(20)."""
    exp_rho = rho.clamp_max(LINEAR_FROM).exp_()
    scale = exp_rho.log1p()
    return exp_rho, torch.maximum(scale, rho, out=scale).clamp_min_(MIN_SCALE)


def blocks(padding_idx: int | None, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Flat blocks of all tensors together, as views; the padding row is left out and set to zero in the last two."""
    for grad in tensors[-2:]:
        if grad is not None and padding_idx is not None:
            grad[padding_idx] = 0
    for rows in (slice(None),) if padding_idx is None else (slice(0, padding_idx), slice(padding_idx + 1, None)):
        flat = [None if tensor is None else tensor.detach()[rows].reshape(-1) for tensor in tensors]
        length = next(tensor.numel() for tensor in flat if tensor is not None)
        size = block_size(*flat)
        for start in range(0, length, size):
            yield tuple(None if tensor is None else tensor[start : start + size] for tensor in flat)
