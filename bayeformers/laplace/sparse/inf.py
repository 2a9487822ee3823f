r"""The sparse information form of one layer's curvature: its leading Kronecker eigenpairs plus a diagonal correction.

    F ~ V diag(lam) V^T + diag(D),    D = diag(F) - diag(V diag(lam) V^T),    precision P = scale F + tau I

V holds the k columns of U_G (x) U_A with the largest corrected eigenvalues. D keeps the exact diagonal of F; where it
is negative it is clamped to 0, so that P is positive definite. Lee et al. 2020 (arXiv 2006.11631), "Estimating model
uncertainty of neural networks in sparse information form".

A column of V is the outer product of one column of U_G and one of U_A: only those are stored, with their index pairs.
With w = d_out d_in weights and r <= min(k, d_out), c <= min(k, d_in) distinct columns, that is r d_out + c d_in + 3 k +
w numbers, against d_out^2 + d_in^2 + w of an eigendecomposed layer: worth it where k is small. A precision's
factorization adds k^2 + w numbers, held for the last precision used.

With B = diag(dd)^(-1/2) V diag(sqrt(scale lam)), dd = scale D + tau, and B^T B = Q diag(m) Q^T (k x k):

    log det P = sum log dd + sum log(1 + m)
    P^-1 = R R^T,    R = diag(dd)^(-1/2) (I - B Q diag(1 / (s (s + 1))) Q^T B^T),    s = sqrt(1 + m)
    P^-1 = diag(dd)^(-1/2) (I - B Q diag(1 / (1 + m)) Q^T B^T) diag(dd)^(-1/2)                            (Woodbury)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LowRankPlusDiagonal"]

_CHUNK = 2**22  # elements of V held at a time: 32 MiB in float64


@dataclass(frozen=True)
class _Inverse:
    """What one precision needs: dd^(-1/2) (d_out, d_in), m (k,), Q (k, k) and sqrt(scale lam) (k,)."""

    root: Tensor
    values: Tensor
    vectors: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class LowRankPlusDiagonal:
    """F ~ V diag(lam) V^T + diag(D) for one layer (d_out, d_in), in the row-major order of its weight.

    Attributes:
        left: the distinct columns of U_G in use, (d_out, r).
        right: the distinct columns of U_A in use, (d_in, c).
        rows: (k,), column of ``left`` of each eigenpair.
        columns: (k,), column of ``right`` of each eigenpair.
        eigenvalues: lam (k,) >= 0.
        unclamped_diagonal: D (d_out, d_in), which may be negative; ``diagonal`` is what the precision uses.

    >>> half = LowRankPlusDiagonal.from_ekfac(torch.eye(2), torch.eye(2), torch.ones(2, 2), torch.ones(2, 2), rank=2)
    >>> half.log_determinant(tau=1.0)  # the identity plus the identity
    tensor(2.7726)
    """

    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor
    eigenvalues: Tensor
    unclamped_diagonal: Tensor
    # of the last precision: its factorization costs k (r + c) w operations, a draw from it k times fewer
    _memo: dict[tuple[float, float], _Inverse] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_ekfac(
        cls, left: Tensor | None, right: Tensor | None, eigenvalues: Tensor, diagonal: Tensor, rank: int
    ) -> LowRankPlusDiagonal:
        """Return the form with the ``rank`` largest of the corrected eigenvalues, all else in its diagonal.

        Args:
            left: U_G, orthogonal (d_out, d_out), or None for the identity.
            right: U_A, orthogonal (d_in, d_in), or None for the identity.
            eigenvalues: diag(U^T F U) of U = U_G (x) U_A, as a (d_out, d_in) matrix, >= 0.
            diagonal: diag(F), (d_out, d_in), >= 0.
            rank: k, 1 <= k <= d_out d_in.

        Raises:
            ValueError: shapes that do not belong together, values that are negative or not finite, such a rank.
        """
        _check_shapes(left, right, eigenvalues, diagonal)
        if not 1 <= rank <= eigenvalues.numel():
            raise ValueError(f"`rank` must lie in [1, {eigenvalues.numel()}], got {rank!r}.")
        top, order = eigenvalues.flatten().topk(rank)
        rows, row_of = torch.unique(order // eigenvalues.shape[1], return_inverse=True)
        columns, column_of = torch.unique(order % eigenvalues.shape[1], return_inverse=True)
        chosen_left, chosen_right = _columns(left, rows, eigenvalues, 0), _columns(right, columns, eigenvalues, 1)
        kept = top.new_zeros(len(rows), len(columns)).index_put_((row_of, column_of), top)
        rest = diagonal - chosen_left.square() @ kept @ chosen_right.square().T
        return cls(chosen_left, chosen_right, row_of, column_of, top, rest)

    @property
    def diagonal(self) -> Tensor:
        """D >= 0 (d_out, d_in), as the precision uses it."""
        return self.unclamped_diagonal.clamp_min(0.0)

    def log_determinant(self, tau: float, *, scale: float = 1.0) -> Tensor:
        """Return log det P, a scalar.

        Args:
            tau: the prior precision, > 0.
            scale: of the curvature, > 0: 1 / (temperature s^2).
        """
        inverse = self._inverse(tau, scale)
        return inverse.values.log1p().sum() - 2 * inverse.root.log().sum()

    def draw(self, noise: Tensor, tau: float, *, scale: float = 1.0) -> Tensor:
        """R z ~ N(0, P^-1) for z ~ N(0, I): deviations from the mean weight, linear in the noise.

        Args:
            noise: (..., d_out, d_in), one standard normal per weight and draw.
            tau: the prior precision, > 0.
            scale: of the curvature, > 0.

        Returns:
            Of the noise's shape.
        """
        inverse = self._inverse(tau, scale)
        s = (1 + inverse.values).sqrt()
        return inverse.root * self._deflate(_checked(noise, "noise", self.unclamped_diagonal), inverse, s * (s + 1))

    def covariance_product(self, x: Tensor, tau: float, *, scale: float = 1.0) -> Tensor:
        """Return P^-1 x, of the shape of x, by Woodbury's identity.

        Args:
            x: one number per weight, (..., d_out, d_in).
            tau: the prior precision, > 0.
            scale: the factor of the curvature, > 0.
        """
        inverse = self._inverse(tau, scale)
        x = inverse.root * _checked(x, "x", self.unclamped_diagonal)
        return inverse.root * self._deflate(x, inverse, 1 + inverse.values)

    def dense(self, tau: float, *, scale: float = 1.0) -> Tensor:
        """P itself, (d_out d_in, d_out d_in): for small layers."""
        _check_positive(tau, scale)
        vectors = self._eigenvectors(0, len(self.eigenvalues)).flatten(1).T
        low_rank = (vectors * self.eigenvalues) @ vectors.T
        return scale * (low_rank + self.diagonal.flatten().diag()) + tau * torch.eye(len(vectors)).to(vectors)

    # ------------------------------------------------------------------------------------------------------------------

    def _inverse(self, tau: float, scale: float) -> _Inverse:
        _check_positive(tau, scale)
        if (tau, scale) not in self._memo:
            inverse = self._factorize(tau, scale)
            self._memo.clear()
            self._memo[tau, scale] = inverse
        return self._memo[tau, scale]

    def _factorize(self, tau: float, scale: float) -> _Inverse:
        root = (scale * self.diagonal + tau).rsqrt()
        weights = (scale * self.eigenvalues).sqrt()
        rank = len(weights)
        step = max(1, _CHUNK // root.numel())
        rows = [self._project(root.square() * self._eigenvectors(k, k + step)) for k in range(0, rank, step)]
        gram = weights[:, None] * torch.cat(rows) * weights
        values, vectors = torch.linalg.eigh(0.5 * (gram + gram.T))
        return _Inverse(root, values.clamp_min(0.0), vectors, weights)

    def _deflate(self, x: Tensor, inverse: _Inverse, divisor: Tensor) -> Tensor:
        """(I - B Q diag(1 / divisor) Q^T B^T) x."""
        coordinates = (self._project(inverse.root * x) * inverse.weights) @ inverse.vectors / divisor
        return x - inverse.root * self._expand((coordinates @ inverse.vectors.T) * inverse.weights)

    def _project(self, x: Tensor) -> Tensor:
        """V^T x: (..., d_out, d_in) -> (..., k)."""
        return (self.left.T @ x @ self.right)[..., self.rows, self.columns]

    def _expand(self, coordinates: Tensor) -> Tensor:
        """V c: (..., k) -> (..., d_out, d_in)."""
        matrix = coordinates.new_zeros(*coordinates.shape[:-1], self.left.shape[1], self.right.shape[1])
        matrix[..., self.rows, self.columns] = coordinates
        return self.left @ matrix @ self.right.T

    def _eigenvectors(self, start: int, stop: int) -> Tensor:
        """Columns start..stop of V, as matrices (k', d_out, d_in)."""
        left, right = self.left.T[self.rows[start:stop]], self.right.T[self.columns[start:stop]]
        return left[:, :, None] * right[:, None, :]


def _columns(basis: Tensor | None, indices: Tensor, like: Tensor, axis: int) -> Tensor:
    """The given columns of a basis, (d, n); of the identity without one."""
    if basis is not None:
        return basis[:, indices]
    chosen = like.new_zeros(like.shape[axis], len(indices))
    chosen[indices, torch.arange(len(indices), device=like.device)] = 1.0
    return chosen


def _check_shapes(left: Tensor | None, right: Tensor | None, eigenvalues: Tensor, diagonal: Tensor) -> None:
    if eigenvalues.dim() != 2:
        raise ValueError(f"`eigenvalues` must have shape (d_out, d_in), got {tuple(eigenvalues.shape)}.")
    sizes = eigenvalues.shape
    for name, basis, size in (("left", left, sizes[0]), ("right", right, sizes[1])):
        if basis is not None and basis.shape != (size, size):
            raise ValueError(f"`{name}` must have shape ({size}, {size}) or be None, got {tuple(basis.shape)}.")
    if diagonal.shape != sizes:
        raise ValueError(f"`diagonal` must have shape {tuple(sizes)}, got {tuple(diagonal.shape)}.")
    for name, values in (("eigenvalues", eigenvalues), ("diagonal", diagonal)):
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"`{name}` must be finite and >= 0, got a minimum of {values.min().item()}.")


def _check_positive(tau: float, scale: float) -> None:
    for name, value in (("tau", tau), ("scale", scale)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be finite and > 0, got {value!r}.")


def _checked(x: Tensor, name: str, like: Tensor) -> Tensor:
    if x.shape[-2:] != like.shape:
        raise ValueError(f"`{name}` must have shape (..., {like.shape[0]}, {like.shape[1]}), got {tuple(x.shape)}.")
    return x
