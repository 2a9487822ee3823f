"""The algebra of one layer's Gaussian against dense Kronecker products, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayeformers.laplace import KroneckerEigen
from bayeformers.laplace.kronecker import add_second_moment, symmetric, symmetric_eigen
from tests.laplace.reference import basis, close, dense, kronecker, normal

TAU, SCALE = 0.7, 2.5


def factor(blocks: int, size: int, rank: int, seed: int) -> Tensor:
    rows = normal(blocks, rank, size, seed=seed)
    return rows.mT @ rows


def from_factors(blocks: int = 1) -> tuple[KroneckerEigen, Tensor]:
    """With the dense F = G (x) A; A has rank 3 of 4."""
    gradients, inputs = factor(blocks, 3, 5, 0), factor(blocks, 4, 3, 1)
    return KroneckerEigen.from_factors(gradients, inputs), kronecker(gradients, inputs)


def rotated(left: bool, right: bool, blocks: int) -> KroneckerEigen:
    """Any eigenvalues (EKFAC's are no product), and bases that may be the identity."""
    values = normal(blocks, 3, 4, seed=2).square()
    bases = [torch.linalg.qr(normal(blocks, n, n, seed=n)).Q for n in (3, 4)]
    return KroneckerEigen(bases[0] if left else None, bases[1] if right else None, values)


each_form = pytest.mark.parametrize(("left", "right"), [(True, True), (False, True), (True, False), (False, False)])
each_block_count = pytest.mark.parametrize("blocks", [1, 2])


def units(eigen: KroneckerEigen) -> Tensor:
    """The p unit vectors as matrices."""
    shape = eigen.eigenvalues.shape
    return torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)


@each_block_count
def test_factors_are_decomposed(blocks: int) -> None:
    eigen, expected = from_factors(blocks)
    close(dense(eigen), expected, 1e-14)
    assert bool((eigen.eigenvalues >= 0).all())


@each_form
@each_block_count
def test_everything_is_the_dense_gaussian(left: bool, right: bool, blocks: int) -> None:
    eigen = rotated(left, right, blocks)
    u, size = basis(eigen), eigen.eigenvalues.numel()
    precision = SCALE * dense(eigen) + TAU * torch.eye(size, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    close(eigen.rotate(units(eigen)).flatten(1).T, u.T, 1e-14)
    close(eigen.rotate_back(units(eigen)).flatten(1).T, u, 1e-14)
    close(eigen.precision(TAU, SCALE).flatten(), (u.T @ precision @ u).diagonal(), 1e-13)
    close(eigen.covariance_product(units(eigen), TAU, SCALE).flatten(1), covariance, 1e-13)
    close(eigen.marginal_variance(TAU, SCALE).flatten(), covariance.diagonal(), 1e-13)
    close(eigen.log_determinant(TAU, SCALE), torch.linalg.slogdet(precision).logabsdet, 1e-13)
    root = eigen.draw(units(eigen), TAU, SCALE).flatten(1).T
    close(root @ root.T, covariance, 1e-13)


@each_form
def test_directions_are_eigenvectors(left: bool, right: bool) -> None:
    eigen = rotated(left, right, 2)
    f = dense(eigen)
    for index in ((0, 0, 0), (1, 2, 3), (0, 2, 1)):
        direction = eigen.direction(*index).flatten()
        torch.testing.assert_close(f @ direction, eigen.eigenvalues[index] * direction)
        torch.testing.assert_close(direction.norm(), torch.ones((), dtype=torch.float64))


def test_leading_axes_are_kept() -> None:
    eigen = rotated(True, True, 2)
    matrices = normal(5, 6, 2, 3, 4)
    found = eigen.covariance_product(matrices, TAU)
    torch.testing.assert_close(found[4, 2], eigen.covariance_product(matrices[4, 2], TAU))


def test_eigenvalues_are_clamped_and_keep_their_dtype() -> None:
    """A rank-1 factor in float32 has eigenvalues of either sign at the level of rounding."""
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    values, vectors = symmetric_eigen((row.T @ row)[None])
    assert values.dtype == vectors.dtype == torch.float32
    assert float(values.min()) >= 0 and bool((values.diff() >= 0).all())
    torch.testing.assert_close(values[0, -1], row.square().sum())


def test_log_determinant_is_summed_in_float64() -> None:
    """1e6 equal logs in float32 would lose their last digits."""
    eigen = KroneckerEigen(None, None, torch.zeros(1, 1000, 1000))
    found = eigen.log_determinant(3.0)
    expected = 1e6 * torch.tensor(3.0, dtype=torch.float64).log()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@each_block_count
@pytest.mark.parametrize("with_one", [True, False])
@pytest.mark.parametrize("width", [3, 127, 128, 130, 600])  # within a block, at its edge, several narrow and wide ones
def test_second_moments_by_blocks(width: int, with_one: bool, blocks: int) -> None:
    """On and above the diagonal, beside what was there; rows of zeros count as (0, 1)."""
    rows = normal(blocks, 9, width, seed=width)
    rows[:, 2:5] = 0
    rows[:, 6, 0] = 0  # no row of zeros, though its first element is
    whole = torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if with_one else rows
    before = normal(blocks, whole.shape[-1], whole.shape[-1], seed=1)
    total = before.clone()
    add_second_moment(total, rows, with_one=with_one)
    close(total.triu(), (before + torch.einsum("kpi,kpj->kij", whole, whole)).triu(), 1e-12)
    close(symmetric(total), symmetric(total).mT)
