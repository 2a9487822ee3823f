"""One Bayesian tensor: its mean, its scale, and its value under a draw."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributions import scale_from_rho, unit_of
from ..distributions.diagonal_normal import scale_slope
from ..sampling.generators import NOISE_VERSION
from . import noise


@dataclass(frozen=True)
class TensorSpec:
    """What the noise of a tensor depends on besides the draw; tied tensors share one.

    Attributes:
        name: first name that owns the tensor in the unwrapped model: the key of its noise.
        by_row: noise addressable by row (an Embedding owns the tensor), so that a lookup needs no whole table.
        padding_idx: row without noise and without KL.
        untrained_idx: where there is no such row, one whose lookups give no gradient: torch's padding row, of a table
            whose tied head predicts that token.
        named: False while a hand-built layer has only its parameter's name, which is not unique in a model.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    is_shared_by_views: ClassVar[bool] = True

    name: str
    by_row: bool = False
    padding_idx: int | None = None
    named: bool = False
    untrained_idx: int | None = None
    noise_version: int = NOISE_VERSION

    @property
    def unlearned_row(self) -> int | None:
        """The row whose lookups give no gradient."""
        return self.untrained_idx if self.padding_idx is None else self.padding_idx


class Draw:
    """One draw of all weights of a model, made tensor by tensor when asked for.

    Values are kept as long as the draw lives (``keep=True``: a held draw) or as long as autograd needs them
    (a training draw); either way the same tensor always gets the same value.
    """

    def __init__(self, seed: int, index: int = 0, *, keep: bool = True) -> None:
        self.seed, self.index = seed, index
        self._noise: Any = {} if keep else weakref.WeakValueDictionary()
        self._weights: dict[str, tuple[tuple[Any, ...], Tensor]] | None = {} if keep else None
        self._tables: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def key(self, spec: TensorSpec) -> int:
        """Noise key of a tensor in this draw."""
        return noise.noise_key(self.seed, self.index, spec.name)

    def noise(self, spec: TensorSpec, loc: Tensor) -> Tensor:
        """N(0, 1) of the shape of ``loc``, float32; the padding row is zero."""
        value: Tensor | None = self._noise.get(spec.name)
        if value is None or value.shape != loc.shape or value.device != loc.device:
            value = self._make_noise(spec, loc)
            self._noise[spec.name] = value
        return value

    def weight(self, spec: TensorSpec, loc: Tensor, rho: Tensor, floor: Tensor | None = None) -> Tensor:
        """loc + sigma * noise; under ``no_grad`` a held draw makes it once and keeps it while loc and rho stand."""
        if torch.is_grad_enabled() or self._weights is None or torch.compiler.is_compiling():
            return sample(loc, rho, self.noise(spec, loc), floor)
        kept = self._weights.get(spec.name)
        if kept is None or kept[0] != _stamp(loc, rho):
            kept = _stamp(loc, rho), sample(loc, rho, self._make_noise(spec, loc), floor)
            self._weights[spec.name] = kept
        return kept[1]

    def rows(self, spec: TensorSpec, loc: Tensor, rho: Tensor, rows: Tensor, floor: Tensor | None = None) -> Tensor:
        """Rows of :meth:`weight`, bit for bit, at the cost of those rows: (n,) -> (n, width).

        Under ``no_grad`` a held draw keeps the rows that it has made.
        """
        if torch.is_grad_enabled() or self._weights is None or torch.compiler.is_compiling():
            return self._make_rows(spec, loc, rho, rows, floor)
        if spec.name in self._weights:
            return F.embedding(rows, self.weight(spec, loc, rho, floor))
        kept = self._tables.get(spec.name)
        if kept is None or kept[0] != _stamp(loc, rho):
            kept = _stamp(loc, rho), torch.empty_like(loc), torch.zeros(len(loc), 1, device=loc.device)
            self._tables[spec.name] = kept
        _, table, made = kept
        missing = rows[F.embedding(rows, made)[:, 0] == 0]  # `embedding` also refuses ids that indexing would wrap
        if missing.numel():
            table[missing] = self._make_rows(spec, loc, rho, missing, floor)
            made[missing] = 1
        return F.embedding(rows, table)

    def perturbed_rows(
        self, spec: TensorSpec, loc: Tensor, rho: Tensor, rows: Tensor, floor: Tensor | None = None
    ) -> Tensor:
        """sigma * noise of the given rows: (n,) -> (n, width)."""
        eps, row = self._noise_of_rows(spec, loc, rows), spec.unlearned_row
        if floor is None:
            return perturbation(F.embedding(rows, rho, row), eps, loc.dtype)
        return multiplied(F.embedding(rows, loc, row), F.embedding(rows, rho, row), eps, floor)

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Fair signs (examples, features) of one axis of a tensor: the same whenever this draw is asked for them."""
        return noise.signs(noise.noise_key(self.seed, self.index, f"{spec.name}/signs{axis}"), shape, device)

    def _make_rows(self, spec: TensorSpec, loc: Tensor, rho: Tensor, rows: Tensor, floor: Tensor | None) -> Tensor:
        eps, row = self._noise_of_rows(spec, loc, rows), spec.unlearned_row
        return sample(F.embedding(rows, loc, row), F.embedding(rows, rho, row), eps, floor)

    def _noise_of_rows(self, spec: TensorSpec, loc: Tensor, rows: Tensor) -> Tensor:
        compiled = torch.compiler.is_compiling()
        key = noise.traced_key(str(self.seed), self.index, spec.name, rows.device) if compiled else self.key(spec)
        return _without_padding(noise.normal_rows(key, rows, loc.shape[1]), spec, rows)

    @property
    def nbytes(self) -> int:
        """Memory of the values that are kept."""
        made = list((self._weights or {}).values()), list(self._tables.values())  # another thread may add to them
        kept = [entry[1] for entries in made for entry in entries] + list(self._noise.values())
        return sum(value.numel() * value.element_size() for value in kept)

    def _make_noise(self, spec: TensorSpec, loc: Tensor) -> Tensor:
        if spec.by_row:
            return self._noise_of_rows(spec, loc, torch.arange(loc.shape[0], device=loc.device))
        if torch.compiler.is_compiling():
            seed, shape = str(self.seed), list(loc.shape)
            value: Tensor = noise.traced_normal(seed, self.index, spec.name, shape, loc.device, spec.noise_version)
            return value
        return noise.normal(self.key(spec), loc.shape, loc.device, spec.noise_version)


class TracedDraw(Draw):
    """A training draw inside `torch.compile`: noise straight from torch's default generator, without graph breaks."""

    def __init__(self) -> None:
        self._noise, self._weights, self._tables = {}, None, {}
        self._signs: dict[tuple[str, int, tuple[int, int]], Tensor] = {}

    def signs(self, spec: TensorSpec, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Made once per forward and shape."""
        key = (spec.name, axis, shape)
        if key not in self._signs:
            self._signs[key] = torch.randint(2, shape, device=device, dtype=torch.float32) * 2 - 1
        return self._signs[key]

    def rows(self, spec: TensorSpec, loc: Tensor, rho: Tensor, rows: Tensor, floor: Tensor | None = None) -> Tensor:
        """Rows of the whole table's value: the compiler fuses the lookup."""
        return F.embedding(rows, self.weight(spec, loc, rho, floor), spec.unlearned_row)

    def _make_noise(self, spec: TensorSpec, loc: Tensor) -> Tensor:
        rows = torch.arange(loc.shape[0], device=loc.device)
        return _without_padding(torch.randn_like(loc, dtype=torch.float32), spec, rows)


@dataclass(frozen=True)
class Variational:
    """A Bayesian tensor as an estimator sees it: N(loc, scale^2) and the draw that is active.

    Attributes:
        loc: posterior means (the layer's own Parameter).
        rho: scale = max(softplus(rho), 1e-8); float32, shape of ``loc``.
        spec: what its noise depends on.
        draw: the draw to take.
        floor: of a multiplicative scale, see :func:`scale_of`; None if the scale is additive.
    """

    loc: Tensor
    rho: Tensor
    spec: TensorSpec
    draw: Draw
    floor: Tensor | None = None
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def scale(self) -> Tensor:
        """Standard deviations, in float32 or the wider dtype of ``loc``; the padding row's plays no part."""
        return scale_of(self.loc, self.rho, self.floor)

    @property
    def perturbation(self) -> Tensor:
        """scale * noise under the draw: shape and dtype of ``loc``. Made once."""
        return self._once("perturbation", self._perturbation)

    def _perturbation(self) -> Tensor:
        eps = self.draw.noise(self.spec, self.loc)
        if self.floor is None:
            return perturbation(self.rho, eps, self.loc.dtype)
        return multiplied(self.loc, self.rho, eps, self.floor)

    @property
    def variance(self) -> Tensor:
        """scale^2, in float32 or the wider dtype of ``loc``; 0 in the padding row. Made once."""
        return self._once("variance", self._variance)

    def _variance(self) -> Tensor:
        value = variance(wide(self.rho, self.loc))
        if self.floor is not None:
            value = value * unit_of(self.loc, self.floor).square()
        if self.spec.padding_idx is None:
            return value
        return value.index_fill(0, torch.tensor([self.spec.padding_idx], device=value.device), 0.0)

    def signs(self, axis: int, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Signs (examples, features) of one axis under the draw. Made once: a recurrent cell asks at every step."""
        return self._once(f"signs {axis} {shape}", lambda: self.draw.signs(self.spec, axis, shape, device))

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Not `functools.cached_property`, whose lock torch.compile does not take."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def sample(self) -> Tensor:
        """The tensor's value under the draw: shape and dtype of ``loc``."""
        return self.draw.weight(self.spec, self.loc, self.rho, self.floor)

    def sample_rows(self, rows: Tensor) -> Tensor:
        """Values of the given rows under the draw: (n,) -> (n, width)."""
        return self.draw.rows(self.spec, self.loc, self.rho, rows, self.floor)

    def perturbed_rows(self, rows: Tensor) -> Tensor:
        """scale * noise of the given rows: (n,) -> (n, width)."""
        return self.draw.perturbed_rows(self.spec, self.loc, self.rho, rows, self.floor)


def wide(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in float32, or in float64 where ``like`` is: the precision in which scales and KLs are computed."""
    return tensor.to(torch.promote_types(torch.promote_types(tensor.dtype, like.dtype), torch.float32))


def scale_of(loc: Tensor, rho: Tensor, floor: Tensor | None) -> Tensor:
    """sigma: softplus(rho), or softplus(rho) * max(|loc|, floor) where the scale is multiplicative.

    Shape: ``loc`` and ``rho`` alike -> the same, float32 or the wider dtype of ``loc``.
    """
    scale = scale_from_rho(wide(rho, loc))
    return scale if floor is None else scale * unit_of(loc, floor)


def sample(loc: Tensor, rho: Tensor, eps: Tensor, floor: Tensor | None = None) -> Tensor:
    """w = loc + sigma(rho) * eps, with dL/drho = dL/dw * eps * sigmoid(rho), in the dtype of ``loc``.

    With a ``floor`` the scale is multiplicative, and the gradient also goes through its |loc|.

    Shape: all three alike -> the same.
    """
    if floor is not None:
        return loc + multiplied(loc, rho, eps, floor)
    return _sampled(loc, rho, eps, loc.dtype)


def perturbation(rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    """sigma(rho) * eps, which is :func:`sample` without the mean.

    Shape: both alike -> the same, in ``dtype``.
    """
    return _sampled(None, rho, eps, dtype)


def multiplied(loc: Tensor, rho: Tensor, eps: Tensor, floor: Tensor) -> Tensor:
    """:func:`perturbation` under a multiplicative scale: softplus(rho) * max(|loc|, floor) * eps.

    Shape: all three alike -> the same, in the dtype of ``loc``.
    """
    unit = unit_of(loc, floor)
    return (unit * perturbation(rho, eps, unit.dtype)).to(loc.dtype)


def variance(rho: Tensor) -> Tensor:
    """sigma(rho)^2; saves rho alone for the gradient 2 sigma sigmoid(rho).

    Shape: any -> the same.
    """
    value: Tensor = _Variance.apply(rho)  # type: ignore[no-untyped-call]
    return value


def _sampled(loc: Tensor | None, rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.is_grad_enabled():  # to bind the arguments of an autograd function costs more than small tensors do
        return _Sample.forward(loc, rho, eps, dtype)
    value: Tensor = _Sample.apply(loc, rho, eps, dtype)  # type: ignore[no-untyped-call]
    return value


def _stamp(loc: Tensor, rho: Tensor) -> tuple[Any, ...]:
    """Changes whenever the values may have changed."""
    return loc.data_ptr(), loc._version, rho.data_ptr(), rho._version, loc.dtype


def renamed(spec: TensorSpec, name: str) -> TensorSpec:
    """The same tensor under its name in a model."""
    return replace(spec, name=name, named=True)


def _without_padding(eps: Tensor, spec: TensorSpec, rows: Tensor) -> Tensor:
    if spec.padding_idx is None:
        return eps
    return eps.masked_fill((rows == spec.padding_idx)[:, None], 0.0)


class _Sample(torch.autograd.Function):
    """Saves rho and eps only; the chain of elementwise operations would keep three more tensors per weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loc: Tensor | None, rho: Tensor, eps: Tensor, dtype: torch.dtype) -> Tensor:
        wider = torch.promote_types(torch.promote_types(rho.dtype, dtype), torch.float32)
        noise = scale_from_rho(rho.to(wider)).mul_(eps).to(dtype)
        return noise if loc is None else noise.add_(loc)  # not fused: rounding would depend on the position

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
            grad_rho = scale_slope(rho.to(ctx.dtype)).mul_(eps).mul_(grad).to(rho.dtype)
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
        return scale_slope(rho).mul_(scale_from_rho(rho)).mul_(2).mul_(grad)
