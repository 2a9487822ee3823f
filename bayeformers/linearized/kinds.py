"""One class per kind of layer: what its Jacobian is made of, and the sums over it that a Gaussian asks for.

With the inputs a_t of a layer and the gradients g_ct of output c there, an affine layer's Jacobian is the matrix
M_c = sum_t g_ct a_t^T. In the basis U = U_G (x) U_A of a Gaussian with variances V its coordinates are
N = U_G^T M U_A = sum_t (U_G^T g_ct)(U_A^T a_t)^T, and its part of the covariance S_cd = sum_ij N_c,ij N_d,ij V_ij.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from .covariance import (
    affine_coordinates,
    affine_covariance,
    affine_products,
    jacobian_covariance,
    reached,
    separable_covariance,
    table_covariance,
    table_squares,
)
from .separable import Separable, rotated

TOLERANCE = {torch.float64: 0.0}
"""Relative error that `Separable` variances may cause in the covariance, by dtype; elsewhere `FAST_TOLERANCE`."""
FAST_TOLERANCE = 1e-3


class Gaussian(Protocol):
    """N(mean, U diag(V) U^T) over the parameters of one layer, with U = U_G (x) U_A, independent of all other layers.

    The matrix of a layer is (K, d_out, d_in'): K groups of a convolution (1 elsewhere), the bias as the last column.
    """

    @property
    def name(self) -> str:
        """Of the layer; it seeds the block's noise, so no two blocks have the same."""

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layers that use the parameters."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """By their name in the layer: "weight", "bias" or both."""

    @property
    def left(self) -> Tensor | None:
        """U_G, (K, d_out, d_out); None: the identity."""

    @property
    def right(self) -> Tensor | None:
        """U_A, (K, d_in', d_in'); None: the identity."""

    @property
    def is_flat(self) -> bool:
        """Whether the matrix is flattened to (1, 1, p), and U_A is (1, p, p): a dense covariance."""

    @property
    def noise_version(self) -> int:
        """Which draws it has, see `bayeformers.sampling.generators`."""

    def variances(self) -> Tensor:
        """V, (n, K, d_out, d_in'), of n posteriors with one U: one pass gives n covariances."""

    def prior_variances(self) -> Tensor | None:
        """(n,): the V of directions that the data do not know; None where there is no such common value."""

    def separable(self, tolerance: float) -> Separable | None:
        """The variances as a short sum of products, where they are: see `Separable`."""


@dataclass(frozen=True, eq=False)
class Captured(ABC):
    """What the Jacobian of one block is made of, for a batch of B and C outputs; positions of all uses are joined.

    A kind of layer says what M is; what follows from M is written here once, and again only where a kind need not
    form M for it.

    Attributes:
        block: whose Jacobian it is.
        inputs: a, (K, B, T, d_in'), with a last column of ones for a bias; ids (1, B, T) of a table.
        gradients: g, (K, B, C, T, d_out).
    """

    block: Gaussian
    inputs: Tensor
    gradients: Tensor
    is_affine: ClassVar[bool] = False
    has_factors: ClassVar[bool] = False
    """Whether sums of g g^T and of a a^T make a Kronecker-factored curvature."""

    @classmethod
    def from_parts(cls, block: Gaussian, inputs: Tensor, gradients: Tensor) -> Captured:
        """Return what a layer of this kind captured; of a dense covariance where the block has one.

        Args:
            block: the Gaussian whose Jacobian it is.
            inputs: the layer's bare inputs, (K, B, T, d_in), without a column for the bias.
            gradients: g, (K, B, C, T, d_out).
        """
        return DenseCaptured(block, inputs, gradients, cls) if block.is_flat else cls(block, inputs, gradients)

    def under(self, block: Gaussian) -> Captured:
        """The same Jacobian under another Gaussian over its layer."""
        return _under(type(self), block, self.inputs, self.gradients)

    @abstractmethod
    def jacobian(self) -> Tensor:
        """M, (K, B, C, d_out, d_in')."""

    def part(self, examples: slice) -> Self:
        """The same of some examples."""
        return replace(self, inputs=self.inputs[:, examples], gradients=self.gradients[:, examples])

    def split(self, size: int) -> Iterator[Self]:
        """Parts of at most ``size`` examples."""
        return (self.part(slice(start, start + size)) for start in range(0, self.inputs.shape[1], size))

    def coordinates(self) -> Tensor:
        """N = U_G^T M U_A, (K, B, C, d_out, d_in'), of the block's own form."""
        matrix, left, right = self.jacobian(), self.block.left, self.block.right
        if left is not None:
            matrix = torch.matmul(left.mT[:, None, None], matrix)
        return matrix if right is None else torch.matmul(matrix, right[:, None, None])

    def squares(self) -> Tensor:
        """Sum over examples and outputs of N^2, (K, d_out, d_in'): the diagonal of J^T J in the block's basis."""
        return self.coordinates().square().sum((1, 2))

    def covariance(self) -> Tensor:
        """This block's part of S, (n, B, C, C)."""
        return jacobian_covariance(self.coordinates(), self.block.variances())

    def selected(self, directions: Tensor) -> Tensor:
        """J v_k of eigen-directions, by their flat index in (K, d_out, d_in'): (B, C, m)."""
        return self.coordinates().movedim(0, 2).flatten(2)[..., directions]

    def gram(self) -> Tensor:
        """J J^T, (1, B, C, C)."""
        matrix = self.jacobian()
        return jacobian_covariance(matrix, torch.ones_like(matrix[:, 0, 0]).unsqueeze(0))

    def products(self, deviation: Tensor) -> Tensor:
        """J eta, (B, C), for a matrix eta (K, d_out, d_in')."""
        return torch.einsum("kbcij,kij->bc", self.jacobian(), deviation)


class AffineCaptured(Captured):
    """M_c = sum_t g_ct a_t^T, a matrix of rank T: vectors are cheaper to rotate and to multiply than M."""

    is_affine = has_factors = True

    @classmethod
    def from_parts(cls, block: Gaussian, inputs: Tensor, gradients: Tensor) -> Captured:
        """Return what an affine layer captured; the input of a bias is 1.

        Args:
            block: the Gaussian whose Jacobian it is.
            inputs: the layer's bare inputs, (K, B, T, d_in), without a column for the bias.
            gradients: g, (K, B, C, T, d_out).
        """
        return super().from_parts(block, in_block(block.parameters, inputs.to(gradients.dtype)), gradients)

    def jacobian(self) -> Tensor:
        """M, (K, B, C, d_out, d_in')."""
        return torch.matmul(self.gradients.mT, self.inputs.unsqueeze(2))

    def coordinates(self) -> Tensor:
        """N, (K, B, C, d_out, d_in'), of rotated vectors."""
        return affine_coordinates(self.inputs, self.gradients, self.block.left, self.block.right)

    def covariance(self) -> Tensor:
        """This block's part of S, (n, B, C, C), by the cheapest of three ways."""
        block = self.block
        inputs, grads = reached(self.inputs, self.gradients)
        separable = block.separable(TOLERANCE.get(grads.dtype, FAST_TOLERANCE))
        if separable is not None and separable.pays(inputs, grads):
            assert block.left is not None and block.right is not None  # a separable block has a basis
            return separable_covariance(inputs, grads, block.left, block.right, separable)
        return affine_covariance(inputs, grads, block.left, block.right, block.variances())

    def selected(self, directions: Tensor) -> Tensor:
        """J v_k, (B, C, m), without the other coordinates."""
        k, i, j = torch.unravel_index(directions, self.block.variances().shape[1:])
        left, right = self.block.left, self.block.right
        a = self.inputs[k, :, :, j] if right is None else torch.einsum("mbtj,mj->mbt", self.inputs[k], right[k, :, j])
        grads = self.gradients
        g = grads[k, ..., i] if left is None else torch.einsum("mbcti,mi->mbct", grads[k], left[k, :, i])
        return torch.einsum("mbct,mbt->bcm", g, a)

    def products(self, deviation: Tensor) -> Tensor:
        """J eta, (B, C), of vectors."""
        return affine_products(self.inputs, self.gradients, deviation)


class TableCaptured(Captured):
    """M_c has the gradient g_ct in the row that position t looked up, and zeros elsewhere: none is formed."""

    has_factors = True

    @classmethod
    def from_parts(cls, block: Gaussian, inputs: Tensor, gradients: Tensor) -> Captured:
        """Return what a table captured, without its padding row, which torch does not train.

        Args:
            block: the Gaussian whose Jacobian it is.
            inputs: the row numbers that were looked up, (1, B, T).
            gradients: g, (1, B, C, T, d).
        """
        padding = getattr(block.modules[0], "padding_idx", None)
        if padding is not None:
            gradients = gradients * (inputs != padding)[:, :, None, :, None]
        return super().from_parts(block, inputs, gradients)

    def jacobian(self) -> Tensor:
        """M, (1, B, C, rows, d), mostly zeros."""
        one_hot = nn.functional.one_hot(self.inputs[0], len(self.block.parameters["weight"])).to(self.gradients)
        return torch.matmul(one_hot.mT.unsqueeze(1), self.gradients)

    def squares(self) -> Tensor:
        """Sum of N^2, (1, rows, d)."""
        return table_squares(self.inputs[0], self._rotated(), len(self.block.parameters["weight"]))

    def covariance(self) -> Tensor:
        """This block's part of S, (n, B, C, C)."""
        return table_covariance(self.inputs, self.gradients, self.block.right, self.block.variances())

    def selected(self, directions: Tensor) -> Tensor:
        """J v_k, (B, C, m), of the rows that are looked up."""
        _, i, j = torch.unravel_index(directions, self.block.variances().shape[1:])
        g = self._rotated()
        return torch.einsum("bctm,btm->bcm", g[..., j], (self.inputs[0, :, :, None] == i).to(g.dtype))

    def gram(self) -> Tensor:
        """J J^T, (1, B, C, C)."""
        return table_covariance(self.inputs, self.gradients, None, torch.ones_like(self.block.variances()[:1]))

    def products(self, deviation: Tensor) -> Tensor:
        """J eta, (B, C), of the rows that are looked up."""
        return torch.einsum("bctd,btd->bc", self.gradients[0], deviation[0, self.inputs[0]])

    def _rotated(self) -> Tensor:
        """The gradients in the basis of the features, (B, C, T, d)."""
        return rotated(self.gradients, self.block.right)[0]


class GainCaptured(Captured):
    """A normalisation: row 0 of M is sum_t g_t * xhat_t for its gain, row 1 is sum_t g_t for its bias."""

    def jacobian(self) -> Tensor:
        """M, (1, B, C, 1 or 2, d)."""
        inputs = {"weight": self.inputs, "bias": torch.ones_like(self.inputs)}
        rows = [(self.gradients * inputs[name].unsqueeze(2)).sum(3) for name in self.block.parameters]
        return torch.stack(rows, dim=-2)


class TensorCaptured(Captured):
    """One parameter of any module, in a batch of one: M is the gradient in it."""

    def jacobian(self) -> Tensor:
        """M, (1, 1, C, 1, p)."""
        return self.gradients


@dataclass(frozen=True, eq=False)
class DenseCaptured(Captured):
    """A layer under a dense covariance, whose basis is that of the flattened M.

    Attributes:
        kind: what M is.
    """

    kind: type[Captured]

    def under(self, block: Gaussian) -> Captured:
        """The same Jacobian under another Gaussian over its layer."""
        return _under(self.kind, block, self.inputs, self.gradients)

    def jacobian(self) -> Tensor:
        """M of the layer's kind, (K, B, C, d_out, d_in')."""
        return self.kind(self.block, self.inputs, self.gradients).jacobian()

    def coordinates(self) -> Tensor:
        """N = vec(M)^T U_A, (1, B, C, 1, p)."""
        flat = self.jacobian().movedim(0, 2).flatten(2)[None, :, :, None]
        return flat if self.block.right is None else torch.matmul(flat, self.block.right[:, None, None])

    def products(self, deviation: Tensor) -> Tensor:
        """J eta of the layer's kind, (B, C)."""
        return self.kind(self.block, self.inputs, self.gradients).products(deviation)


def _under(kind: type[Captured], block: Gaussian, inputs: Tensor, gradients: Tensor) -> Captured:
    """Of a kind of layer, under the block's covariance."""
    return DenseCaptured(block, inputs, gradients, kind) if block.is_flat else kind(block, inputs, gradients)


def in_block(parameters: Iterable[str], a: Tensor) -> Tensor:
    """Inputs of the named parameters: a (..., d_in) of a weight, then 1 for a bias; (..., d_in')."""
    parts = {"weight": a, "bias": a.new_ones(*a.shape[:-1], 1)}
    return torch.cat([parts[name] for name in parameters], dim=-1)
