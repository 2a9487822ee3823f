"""One Bayesian tensor: its mean, its scale, and its value under a draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..distributions import scale_from_rho, unit_of
from ..distributions.diagonal_normal import block_scale_into, scale_into, slope_into
from ..sampling import philox
from .noise import Draw as Draw
from .noise import HandedDraw, Kept, TracedDraw
from .noise import TensorSpec as TensorSpec

_BLOCK = 2**16  # what is computed of so many elements stays in cache

Rows = slice | Tensor
"""A slice of a tensor's first axis, or row numbers (n,) of a table."""


@dataclass(frozen=True)
class Variational:
    """A Bayesian tensor as an estimator sees it: N(loc, scale^2) and the draw that is active.

    Attributes:
        loc: posterior means (the layer's own Parameter).
        rho: scale = max(softplus(rho), 1e-8); float32, shape of ``loc``.
        spec: what its noise depends on.
        draw: the draw to take.
        floor: of a multiplicative scale, see :func:`scale_of`; None if the scale is additive.
        part_of: of some rows of a tensor, the whole and which rows.
    """

    loc: Tensor
    rho: Tensor
    spec: TensorSpec
    draw: Draw | TracedDraw | HandedDraw
    floor: Tensor | None = None
    part_of: tuple[Variational, Rows] | None = None
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def scale(self) -> Tensor:
        """Standard deviations, in float32 or the wider dtype of ``loc``; the padding row's plays no part."""
        return scale_of(self.loc, self.rho, self.floor)

    @property
    def noise(self) -> Tensor:
        """N(0, 1) under the draw: shape of ``loc``, float32."""
        if self.part_of is None:
            return self.draw.noise(self.spec, self.loc)
        whole, rows = self.part_of
        return whole.noise[rows] if isinstance(rows, slice) else self.draw.noise(self.spec, whole.loc, rows)

    @property
    def perturbation(self) -> Tensor:
        """The product scale * noise under the draw: shape and dtype of ``loc``. Made once."""
        return self._once("perturbation", lambda: perturbation(self.loc, self.rho, self.noise, self.floor))

    @property
    def variance(self) -> Tensor:
        """scale^2, in float32 or the wider dtype of ``loc``; 0 in the padding row of a whole tensor. Made once."""
        return self._once("variance", self._variance)

    def _variance(self) -> Tensor:
        value = variance(wide(self.rho, self.loc))
        if self.floor is not None:
            value = value * unit_of(self.loc, self.floor).square()
        if self.spec.padding_idx is None or self.part_of is not None:
            return value
        return value.index_fill(0, torch.tensor([self.spec.padding_idx], device=value.device), 0.0)

    def signs(self, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Return the signs of one axis under the draw. They are made once: a recurrent cell asks at every step.

        Args:
            axis: of the tensor, each with signs of its own.
            shape: numbers of examples and features.
            device: where the signs are made.
        """
        return self._once(f"signs {axis} {shape}", lambda: self._signs(axis, shape, device))

    def _signs(self, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        if self.part_of is None or axis:
            return self.draw.signs(self.spec, axis, shape, device)
        whole, rows = self.part_of
        return self.draw.signs(self.spec, 0, (shape[0], len(whole.loc)), device)[:, rows]

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Not `functools.cached_property`, whose lock torch.compile does not take."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def rows(self, rows: Rows) -> Variational:
        """Return some rows as a tensor of their own, under the noise and signs of the whole, at the cost of those rows.

        A padding row takes no noise, as in the whole, but keeps its variance: give it no weight.
        """
        loc, rho = (
            tensor[rows] if isinstance(rows, slice) else F.embedding(rows, tensor, self.spec.unlearned_row)
            for tensor in (self.loc, self.rho)
        )
        return Variational(loc, rho, self.spec, self.draw, self.floor, (self, rows))

    def sample(self) -> Tensor:
        """Return the tensor's value under the draw: shape and dtype of ``loc``.

        Under ``no_grad`` it is made once in a held draw, and kept there while mean and scale stand.
        """
        if isinstance(self.draw, HandedDraw) and not torch.is_grad_enabled():
            return self._handed(self.draw)
        if not self._is_kept:
            return sample(self.loc, self.rho, self.noise, self.floor)
        kept = self._kept()
        if kept is None or kept.made is not None:
            kept = Kept(self._stamp(), self._sample_in_blocks())
            self.draw.kept[self.spec.name] = kept  # type: ignore[index]
        return kept.value

    def _sample_in_blocks(self) -> Tensor:
        """:func:`sample`, bit for bit, without the whole noise in memory where that can be."""
        blocks = None
        if _is_plain(self.loc, self.rho):
            blocks = self.draw.blocks(self.spec, self.loc)  # type: ignore[union-attr]
        if blocks is None:
            return sample(self.loc, self.rho, self.noise, self.floor)
        value, scratch = torch.empty_like(self.loc), torch.empty(min(philox.BLOCK, self.loc.numel()))
        loc, rho, flat = self.loc.view(-1), self.rho.view(-1), value.view(-1)
        for part, eps in blocks:
            if self.floor is None and loc.dtype == rho.dtype == torch.float32:
                noise = block_scale_into(scratch[: len(eps)], rho[part]).mul_(eps)
                torch.add(noise, loc[part], out=flat[part])
            else:
                flat[part] = sample(loc[part], rho[part], eps, self.floor)
        if self.spec.padding_idx is not None:
            value[self.spec.padding_idx] = self.loc[self.spec.padding_idx]
        return value

    def _handed(self, draw: HandedDraw) -> Tensor:
        """The value that compiled code is handed, or these rows of it."""
        if self.part_of is None:
            return draw.value(self.spec)
        whole, rows = self.part_of
        value = whole.sample()
        return value[rows] if isinstance(rows, slice) else F.embedding(rows, value)

    def sample_rows(self, rows: Tensor) -> Tensor:
        """Return rows of :meth:`sample`, bit for bit, at the cost of those rows: (n,) -> (n, width).

        Under ``no_grad`` a held draw keeps the rows that were made in it.
        """
        if not self._is_kept:
            return self.rows(rows).sample()
        kept = self._kept()
        if kept is None:
            made = torch.zeros(len(self.loc), 1, device=self.loc.device)
            kept = Kept(self._stamp(), torch.empty_like(self.loc), made)
            self.draw.kept[self.spec.name] = kept  # type: ignore[index]
        if kept.made is not None:
            missing = rows[F.embedding(rows, kept.made)[:, 0] == 0]  # `embedding` refuses ids that indexing would wrap
            if missing.numel():
                kept.value[missing] = self.rows(missing).sample()
                kept.made[missing] = 1
        return F.embedding(rows, kept.value)

    @property
    def _is_kept(self) -> bool:
        may_keep = self.part_of is None and self.draw.kept is not None
        return may_keep and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _kept(self) -> Kept | None:
        """What the draw has of this tensor, if mean and scale stand."""
        kept = self.draw.kept.get(self.spec.name)  # type: ignore[union-attr]
        return None if kept is None or kept.stamp != self._stamp() else kept

    def _stamp(self) -> tuple[Any, ...]:
        """Changes whenever the values may have changed."""
        loc, rho = self.loc, self.rho
        return loc.data_ptr(), loc._version, rho.data_ptr(), rho._version, loc.dtype


def wide(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 where ``like`` is: the precision in which scales and KLs are computed."""
    return tensor.to(torch.promote_types(torch.promote_types(tensor.dtype, like.dtype), torch.float32))


def scale_of(loc: Tensor, rho: Tensor, floor: Tensor | None) -> Tensor:
    """Return sigma: softplus(rho), or softplus(rho) * max(|loc|, floor) where the scale is multiplicative.

    It is float32, or the wider dtype of ``loc``.

    Args:
        loc: the means, of any shape.
        rho: of the same shape, in float32.
        floor: the least |loc| that counts, a scalar tensor; None: the scale is additive.
    """
    scale = scale_from_rho(wide(rho, loc))
    return scale if floor is None else scale * unit_of(loc, floor)


def sample(loc: Tensor, rho: Tensor, eps: Tensor, floor: Tensor | None = None) -> Tensor:
    """Return w = loc + sigma(rho) * eps, with dL/drho = dL/dw * eps * sigmoid(rho), in the dtype of ``loc``.

    Args:
        loc: the means, of any shape.
        rho: of the same shape, in float32.
        eps: the noise, N(0, 1), of the same shape.
        floor: of a multiplicative scale, a scalar tensor, as in :func:`scale_of`: the gradient also goes through its
            |loc|; None: the scale is additive.
    """
    return _sampled(loc, rho, eps, loc.dtype) if floor is None else loc + perturbation(loc, rho, eps, floor)


def perturbation(loc: Tensor, rho: Tensor, eps: Tensor, floor: Tensor | None = None) -> Tensor:
    """Return sigma * eps, which is :func:`sample` without the mean, in the dtype of ``loc``.

    Args:
        loc: the means, of any shape.
        rho: of the same shape, in float32.
        eps: the noise, N(0, 1), of the same shape.
        floor: of a multiplicative scale, a scalar tensor; None: the scale is additive.
    """
    if floor is None:
        return _sampled(None, rho, eps, loc.dtype)
    unit = unit_of(loc, floor)
    return (unit * _sampled(None, rho, eps, unit.dtype)).to(loc.dtype)


def variance(rho: Tensor) -> Tensor:
    """Return sigma(rho)^2; saves rho alone for the gradient 2 sigma sigmoid(rho).

    Shape: any -> the same.
    """
    value: Tensor = _Variance.apply(rho)  # type: ignore[no-untyped-call]
    return value


def _sampled(loc: Tensor | None, rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled():  # to bind the arguments of an autograd function costs more than small tensors do
        return _Sample.forward(loc, rho, eps, dtype)
    value: Tensor = _Sample.apply(loc, rho, eps, dtype)  # type: ignore[no-untyped-call]
    return value


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are contiguous tensors of the CPU's memory, and nothing that stands in for a tensor."""
    if torch.compiler.is_compiling():
        return False
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    )


def _by_blocks(
    function: Callable[..., Tensor], dtype: torch.dtype, out_dtype: torch.dtype, *tensors: Tensor | None
) -> Tensor:
    """``function`` of all elements, one by one, in blocks that stay in cache; ``dtype`` is its working memory's."""
    like = next(tensor for tensor in tensors if tensor is not None)
    if like.numel() <= _BLOCK or not _is_plain(*tensors):
        return function(None, *tensors)
    value = torch.empty(like.shape, dtype=out_dtype)
    scratch = None if dtype == out_dtype else torch.empty(_BLOCK, dtype=dtype)
    flat, parts = value.view(-1), [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for start in range(0, like.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        memory = flat[part] if scratch is None else scratch[: len(flat[part])]
        done = function(memory, *(None if tensor is None else tensor[part] for tensor in parts))
        if scratch is not None:
            flat[part] = done
    return value


class _Sample(torch.autograd.Function):
    """Saves rho and eps only; the chain of elementwise operations would keep three more tensors per weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor | None, rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
        wider = torch.promote_types(torch.promote_types(rho.dtype, dtype), torch.float32)

        def moved(out: Tensor | None, loc: Tensor | None, rho: Tensor, eps: Tensor) -> Tensor:
            rho = rho.to(wider)
            noise = (scale_into(out, rho) if out is None else block_scale_into(out, rho)).mul_(eps).to(dtype)
            return noise if loc is None else noise.add_(loc)  # not fused: rounding would depend on the position

        return _by_blocks(moved, wider, dtype, loc, rho, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        _, rho, eps, dtype = inputs
        ctx.dtype = torch.promote_types(rho.dtype, dtype)
        ctx.save_for_backward(rho, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_rho = None
        if ctx.needs_input_grad[1]:
            rho, eps = ctx.saved_tensors
            dtype = rho.dtype

            def chained(out: Tensor | None, rho: Tensor, eps: Tensor, grad: Tensor) -> Tensor:
                return slope_into(out, rho.to(ctx.dtype)).mul_(eps).mul_(grad).to(dtype)

            grad_rho = _by_blocks(chained, ctx.dtype, dtype, rho, eps, grad)
        return (grad if ctx.needs_input_grad[0] else None), grad_rho, None, None


class _Variance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rho: Tensor) -> Tensor:
        return scale_from_rho(rho).square_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rho,) = ctx.saved_tensors
        return slope_into(None, rho).mul_(scale_from_rho(rho)).mul_(2).mul_(grad)
