"""Algebra of one layer's Gaussian: precision U diag(scale L + tau) U^T with U = U_G (x) U_A. No data, no network.

Everything is in matrix form, (K, d_out, d_in'), with K independent blocks (groups of a convolution; 1 elsewhere). The
row-major vec of a matrix turns U into `torch.kron(U_G, U_A)`. There is no damping split: the precision
Lambda_ij = scale L_ij + tau is exactly Kronecker plus diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_BLOCK, _NARROW_BLOCK, _WIDE = 256, 128, 512  # columns at a time: fewer leave more of the product out


@dataclass(frozen=True, eq=False)
class KroneckerEigen:
    """A layer's curvature F = U diag(L) U^T, eigendecomposed.

    Attributes:
        left: U_G, (K, d_out, d_out); None: the identity.
        right: U_A, (K, d_in', d_in'); None: the identity.
        eigenvalues: L >= 0, (K, d_out, d_in').
        factors: gamma (K, d_out) and alpha (K, d_in') where L is their product gamma_i alpha_j, or (1, d_in').

    >>> eigen = KroneckerEigen.from_factors(torch.eye(2)[None], torch.eye(3)[None])
    >>> eigen.eigenvalues.shape, eigen.log_determinant(prior_precision=1.0).item() / 6  # log 2
    (torch.Size([1, 2, 3]), 0.6931471805599453)
    """

    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor
    factors: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_product(cls, left: Tensor | None, right: Tensor | None, gamma: Tensor, alpha: Tensor) -> Self:
        """Return the curvature with the eigenvalues L_ij = gamma_i alpha_j.

        Args:
            left: the eigenvectors U_G, (K, d_out, d_out); None: the identity.
            right: the eigenvectors U_A, (K, d_in', d_in'); None: the identity.
            gamma: the eigenvalues of G, (K, d_out).
            alpha: the eigenvalues of A, (K, d_in').
        """
        return cls(left, right, gamma.unsqueeze(-1) * alpha.unsqueeze(-2), (gamma, alpha))

    @classmethod
    def from_factors(cls, gradients: Tensor, inputs: Tensor) -> Self:
        """Return F = G (x) A of ``gradients`` G (K, d_out, d_out) and ``inputs`` A (K, d_in', d_in').

        Decomposed in float64, for the small eigenvalues decide the variance; stored in the factors' dtype.
        """
        (gamma, left), (alpha, right) = symmetric_eigen(gradients), symmetric_eigen(inputs)
        return cls.from_product(left, right, gamma, alpha)

    def precision(self, prior_precision: float, scale: float = 1.0) -> Tensor:
        """Lambda = scale L + tau, (K, d_out, d_in'): the posterior's precision along each eigen-direction."""
        return scale * self.eigenvalues + prior_precision

    def rotate(self, matrix: Tensor) -> Tensor:
        """U^T vec(M) as a matrix: U_G^T M U_A; (..., K, d_out, d_in') -> the same."""
        return _product(None if self.left is None else self.left.mT, matrix, self.right)

    def rotate_back(self, coordinates: Tensor) -> Tensor:
        """U vec(M), the inverse of `rotate`: U_G M U_A^T; (..., K, d_out, d_in') -> the same."""
        return _product(self.left, coordinates, None if self.right is None else self.right.mT)

    def draw(self, noise: Tensor, prior_precision: float, scale: float = 1.0) -> Tensor:
        """Return a deviation from the mean, N(0, (scale F + tau)^-1): U (Lambda^-1/2 * noise), of the noise's shape.

        Args:
            noise: one standard normal per weight, (..., K, d_out, d_in').
            prior_precision: tau > 0.
            scale: 1 / (temperature s^2), which multiplies the curvature.
        """
        return self.rotate_back(noise * self.precision(prior_precision, scale).rsqrt())

    def marginal_variance(self, prior_precision: float, scale: float = 1.0) -> Tensor:
        """The diagonal of the covariance: (U_G^2) (1 / Lambda) (U_A^2)^T, (K, d_out, d_in')."""
        squares = KroneckerEigen(_square(self.left), _square(self.right), self.eigenvalues)
        return squares.rotate_back(self.precision(prior_precision, scale).reciprocal())

    def diagonal(self) -> Tensor:
        """The diagonal of F itself: (U_G^2) L (U_A^2)^T, (K, d_out, d_in')."""
        return KroneckerEigen(_square(self.left), _square(self.right), self.eigenvalues).rotate_back(self.eigenvalues)

    def log_determinant(self, prior_precision: float, scale: float = 1.0) -> Tensor:
        """The log determinant of the precision, sum_ij log Lambda_ij, a float64 scalar."""
        return self.precision(prior_precision, scale).double().log().sum()

    def covariance_product(self, matrix: Tensor, prior_precision: float, scale: float = 1.0) -> Tensor:
        """Return Sigma vec(M) as a matrix, of the shape of M.

        Args:
            matrix: M, (..., K, d_out, d_in').
            prior_precision: tau > 0.
            scale: 1 / (temperature s^2), which multiplies the curvature.
        """
        return self.rotate_back(self.rotate(matrix) / self.precision(prior_precision, scale))

    def direction(self, block: int, row: int, column: int) -> Tensor:
        """Return the unit eigenvector with eigenvalue L[block, row, column], as a matrix (K, d_out, d_in').

        Args:
            block: which of the K independent blocks.
            row: which column of U_G.
            column: which column of U_A.
        """
        unit = torch.zeros_like(self.eigenvalues)
        unit[block, row, column] = 1
        return self.rotate_back(unit)


def add_second_moment(total: Tensor, rows: Tensor, *, with_one: bool = False) -> None:
    """Add sum_p r_p r_p^T of rows (K, P, d) to the blocks on and above the diagonal of ``total`` (K, d, d).

    Half the multiplications for wide layers; `symmetric` gives the whole. Rows of zeros (padding, positions that no
    gradient reaches) are left out.

    Args:
        total: what is added to; (K, d + 1, d + 1) of rows with a one.
        rows: r_p, (K, P, d).
        with_one: of (r_p, 1) instead, which are not made: an odd width is slow to multiply.
    """
    if with_one:
        total[:, :-1, -1] += rows.sum(1)
        total[:, -1, -1] += rows.shape[1]
    if len(rows) == 1:
        empty = rows[0, :, 0] == 0  # of most rows the first element tells
        if bool(empty.any()):
            empty[empty.clone()] = ~rows[0, empty].ne(0).any(-1)
            rows = rows.index_select(1, (~empty).nonzero()[:, 0])
    width = rows.shape[-1]
    block = _BLOCK if width > _WIDE else _NARROW_BLOCK
    for start in range(0, width, block):
        stop = min(start + block, width)
        total[:, start:stop, start:width].baddbmm_(rows[:, :, start:stop].mT, rows[:, :, start:])


def symmetric(upper: Tensor) -> Tensor:
    """The symmetric matrix of which ``upper`` (..., d, d) holds the diagonal and what is above it."""
    return upper.triu() + upper.triu(1).mT


def symmetric_eigen(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues >= 0, ascending, and eigenvectors of symmetric positive semi-definite matrices (K, d, d)."""
    wide = factor.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    # eigh's vectors are stored by column: a reload has them by row, and should compute the same bits
    return values.clamp_min(0).to(factor.dtype), vectors.to(factor.dtype).contiguous()


def _product(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    if left is not None:
        matrix = left @ matrix
    return matrix if right is None else matrix @ right


def _square(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.square()
