"""Variances of a Kronecker-factored block as a short sum of products, most of whose directions have one weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

MAX_RANK = 24
_MOVE = 8  # multiplications in the time that it takes to write and read a number


@dataclass(frozen=True, eq=False)
class Side:
    """Which directions of one basis U, of d, have weights of their own; all others have one common weight.

    With the common weight c, sum_i w_i (U^T x)_i (U^T y)_i = c x . y + sum_k (w_k - c) (U^T x)_k (U^T y)_k over the
    directions k of their own, for U is orthogonal: no other direction is rotated into.

    Attributes:
        own: their indices, (m,); None: all directions, each with its weight.
        common: one of the others.
        basis: their columns of U, (1, d, m), where they are kept.
    """

    own: Tensor | None = None
    common: int = 0
    basis: Tensor | None = None

    def grams(self, vectors: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
        """Sums over the directions i of w_ri (U^T x_t)_i (U^T x_u)_i for all pairs of vectors.

        Args:
            vectors: x, (B, P, d).
            basis: U, (1, d, d).
            weights: w, (R, d).

        Returns:
            (B, R, P, P).
        """
        if self.own is None:
            return _weighted_grams(rotated(vectors[None], basis)[0], weights)
        few = basis[..., self.own] if self.basis is None else self.basis
        common = weights[:, self.common]
        rest = _weighted_grams(rotated(vectors[None], few)[0], weights[:, self.own] - common[:, None])
        plain = torch.bmm(vectors, vectors.mT)  # of one weight whatever the direction: once for all r
        return rest.addcmul_(common[:, None, None], plain[:, None])

    def num_turned(self, weights: Tensor) -> int:
        """Return how many directions are rotated into."""
        return weights.shape[-1] if self.own is None else len(self.own)

    def size(self, weights: Tensor) -> Tensor:
        """Return a bound on the terms that add up to each weight, (R, d)."""
        if self.own is None:
            return weights.abs()
        common = weights[:, self.common, None].abs()
        return common + (weights - weights[:, self.common, None]).abs()

    def with_basis(self, basis: Tensor) -> Side:
        """The same, which keeps its columns of the whole basis (1, d, d)."""
        return self if self.own is None else replace(self, basis=basis[..., self.own].contiguous())

    def to(self, device: torch.device) -> Side:
        """The same on a device."""
        own, basis = (None if x is None else x.to(device) for x in (self.own, self.basis))
        return replace(self, own=own, basis=basis)


@dataclass(frozen=True, eq=False)
class Separable:
    """Variances V of one block as a short sum of products, V_ij = sum_r p_ri q_rj.

    V = 1 / (gamma_i alpha_j + tau) is a Cauchy matrix, whose numerical rank grows with the logarithm of its range only:
    about 11 for a relative error of 1e-3 over eight decades. The variances of EKFAC have no such form. Of directions
    that the data do not know, 1 / tau is the variance whichever they are: see `Side`.

    Attributes:
        rows: p, (R, d_out).
        columns: q, (R, d_in').
        rows_side: which rows have weights of their own.
        columns_side: which columns have.
    """

    rows: Tensor
    columns: Tensor
    rows_side: Side = field(default_factory=Side)
    columns_side: Side = field(default_factory=Side)

    @classmethod
    def from_variances(cls, variances: Tensor, tolerance: float) -> Separable | None:
        """By adaptive cross approximation (Bebendorf 2000): each step removes the element of largest relative error.

        Half of the error is spent on taking variances that are nearly alike for alike, where that leaves no more than
        half of the directions of one side.

        Args:
            variances: V, (d_out, d_in').
            tolerance: relative, in every element.

        Returns:
            None where `MAX_RANK` terms do not reach ``tolerance``, or where rounding could exceed ten times that in the
            smallest element: in float32, for variances over five decades.
        """
        wide = variances.double()
        alike, few_rows = _levelled(wide, tolerance / 4)
        alike, few_columns = _levelled(alike.mT, tolerance / 4)
        if few_rows.own is not None or few_columns.own is not None:
            left = (1 + tolerance) / (1 + tolerance / 4) ** 2 - 1
            found = _crossed(alike.mT, left)
            if found is not None:
                whole = cls(*found, few_rows, few_columns)
                if whole._rounding(wide, variances.dtype) <= tolerance:
                    return whole._in(variances)
        found = _crossed(wide, tolerance)
        plain = None if found is None else cls(*found)
        if plain is None or plain._rounding(wide, variances.dtype) > 10 * tolerance:
            return None
        return plain._in(variances)

    def _rounding(self, variances: Tensor, dtype: torch.dtype) -> float:
        """By how much rounding may change the smallest sum, for terms may be so much larger than their sum."""
        terms = self.rows_side.size(self.rows).mT @ self.columns_side.size(self.columns)
        return float((terms / variances).max()) * torch.finfo(dtype).eps

    def _in(self, variances: Tensor) -> Separable:
        return replace(self, rows=self.rows.to(variances), columns=self.columns.to(variances))

    def with_bases(self, left: Tensor, right: Tensor) -> Separable:
        """The same, which keeps what it needs of the bases U_G (1, d_out, d_out) and U_A (1, d_in', d_in')."""
        sides = self.rows_side.with_basis(left), self.columns_side.with_basis(right)
        return Separable(self.rows, self.columns, *sides)

    def pays(self, inputs: Tensor, gradients: Tensor) -> bool:
        """Whether `separable_covariance` is cheaper than `affine_covariance`, by what each computes and moves."""
        (_, _, positions, d_in), (count, d_out) = inputs.shape, (gradients.shape[2], gradients.shape[4])
        points = count * positions
        outer = self._cost(self.rows_side, self.rows, points)
        inner = self._cost(self.columns_side, self.columns, positions)
        rotations = points * d_out**2 + positions * d_in**2
        return outer + inner < rotations + count * d_out * d_in * (positions + 5 * _MOVE)

    def _cost(self, side: Side, weights: Tensor, points: int) -> int:
        """Multiplications of `Side.grams` for ``points`` vectors of one example."""
        width, turned = weights.shape[-1], side.num_turned(weights)
        whole = 0 if side.own is None else points * width
        return points * (turned * width + len(weights) * turned * (points + _MOVE) + whole)

    def to(self, device: torch.device) -> Separable:
        """The same on a device."""
        if self.rows.device == device:
            return self
        sides = self.rows_side.to(device), self.columns_side.to(device)
        return Separable(self.rows.to(device), self.columns.to(device), *sides)


def _levelled(variances: Tensor, tolerance: float) -> tuple[Tensor, Side]:
    """Variances with one row for all that are nearly alike, and which are not; none is made smaller.

    Args:
        variances: V > 0, (rows, columns).
        tolerance: how much larger, relatively, an element may become.

    Returns:
        V, and the rows of their own; V as it is where these are more than half.
    """
    top = variances.amax(0)
    is_own = (top / variances).amax(1) > 1 + tolerance
    own = is_own.nonzero().flatten()
    if 2 * len(own) > len(variances):
        return variances, Side()
    return torch.where(is_own[:, None], variances, top), Side(own, int((~is_own).nonzero()[0]))


def _crossed(variances: Tensor, tolerance: float) -> tuple[Tensor, Tensor] | None:
    """Factors p (R, d_out) and q (R, d_in') of float64 variances; None where `MAX_RANK` terms do not suffice."""
    scale, rest = variances.reciprocal(), variances
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for _ in range(MAX_RANK + 1):
        i, j = divmod(int((rest * scale).abs().argmax()), rest.shape[1])
        if abs(float(rest[i, j] * scale[i, j])) <= tolerance:
            return torch.stack(rows), torch.stack(columns)
        rows.append(rest[:, j] / rest[i, j])
        columns.append(rest[i])
        rest = rest - torch.outer(rows[-1], columns[-1])
    return None


def _weighted_grams(vectors: Tensor, weights: Tensor) -> Tensor:
    """Sum over i of w_ri x_ti x_ui; (B, P, d), (R, d) -> (B, R, P, P)."""
    weighted = vectors.unsqueeze(1) * weights[:, None]
    grams: Tensor = torch.bmm(weighted.flatten(1, 2), vectors.mT)
    return grams.view(len(vectors), len(weights), *vectors.shape[1:2] * 2)


def rotated(tensor: Tensor, basis: Tensor | None) -> Tensor:
    """(K, ..., d) @ (K, d, r); as it is without a basis."""
    if basis is None:
        return tensor
    moved = torch.matmul(tensor.flatten(1, -2), basis)
    return moved.reshape(*tensor.shape[:-1], basis.shape[-1])
