"""Low rank plus diagonal curvature against dense matrices, in float64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bayeformers.laplace.sparse import inf
from bayeformers.laplace.sparse.inf import LowRankPlusDiagonal

N, CLASSES, D_OUT, D_IN = 12, 3, 4, 5
WEIGHTS = D_OUT * D_IN
TAU = 0.7


class Layer(NamedTuple):
    """A layer's exact GGN F (row-major) and its EKFAC basis."""

    ggn: Tensor
    left: Tensor
    right: Tensor
    eigenvalues: Tensor  # diag(U^T F U) as (D_OUT, D_IN)

    @property
    def diagonal(self) -> Tensor:
        return self.ggn.diagonal().reshape(D_OUT, D_IN)

    def basis(self) -> Tensor:
        return torch.kron(self.left.contiguous(), self.right.contiguous())


def layer(seed: int = 0) -> Layer:
    """F = sum_n sum_c vec(g a^T) vec(g a^T)^T from random inputs a and columns g, example by example."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(N, D_IN, generator=generator, dtype=torch.float64)
    g = torch.randn(N, CLASSES, D_OUT, generator=generator, dtype=torch.float64) * torch.rand(
        N, 1, 1, generator=generator, dtype=torch.float64
    )
    gradients = torch.stack([torch.outer(g[n, c], a[n]).flatten() for n in range(N) for c in range(CLASSES)])
    ggn = gradients.T @ gradients
    left = torch.linalg.eigh(torch.einsum("nci,ncj->ij", g, g)).eigenvectors
    right = torch.linalg.eigh(a.T @ a / N).eigenvectors
    basis = torch.kron(left, right)
    return Layer(ggn, left, right, (basis.T @ ggn @ basis).diagonal().reshape(D_OUT, D_IN))


def approximation(f: Layer, rank: int) -> LowRankPlusDiagonal:
    return LowRankPlusDiagonal.from_ekfac(f.left, f.right, f.eigenvalues, f.diagonal, rank)


def dense_by_hand(f: Layer, rank: int, tau: float, scale: float) -> Tensor:
    """The precision from whole eigenvectors of the whole Kronecker product."""
    order = f.eigenvalues.flatten().argsort(descending=True)[:rank]
    vectors = f.basis()[:, order]
    low_rank = vectors @ f.eigenvalues.flatten()[order].diag() @ vectors.T
    correction = (f.ggn - low_rank).diagonal().clamp_min(0).diag()
    return scale * (low_rank + correction) + tau * torch.eye(WEIGHTS, dtype=torch.float64)


def unit_vectors() -> Tensor:
    return torch.eye(WEIGHTS, dtype=torch.float64).reshape(WEIGHTS, D_OUT, D_IN)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.fixture(params=[1, 5, 11, WEIGHTS])
def rank(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_the_diagonal_is_exact_before_clamping(rank: int) -> None:
    f = layer()
    found = approximation(f, rank)
    low_rank = found.dense(1.0) - torch.eye(WEIGHTS, dtype=torch.float64) - found.diagonal.flatten().diag()
    close(low_rank.diagonal() + found.unclamped_diagonal.flatten(), f.ggn.diagonal())
    assert torch.equal(found.diagonal, found.unclamped_diagonal.clamp_min(0))


def test_the_correction_can_be_negative() -> None:
    """Five eigenpairs can put more on a weight than the curvature has there; P stays positive definite."""
    found = approximation(layer(), 5)
    assert float(found.unclamped_diagonal.min()) < -0.1
    assert float(found.diagonal.min()) == 0
    assert float(torch.linalg.eigvalsh(found.dense(1e-3)).min()) >= 1e-3 * (1 - 1e-9)


@pytest.mark.parametrize("scale", [1.0, 6.5])
@pytest.mark.parametrize("tau", [TAU, 1e-3, 50.0])
def test_everything_matches_the_dense_precision(rank: int, tau: float, scale: float) -> None:
    """Unit vectors through the sampler and the product give R and P^-1 whole; P's condition number is below 1e6."""
    f = layer()
    found, precision = approximation(f, rank), dense_by_hand(f, rank, tau, scale)
    close(found.dense(tau, scale=scale), precision)
    covariance = torch.linalg.inv(precision)
    root = found.draw(unit_vectors(), tau, scale=scale).flatten(1).T
    close(root @ root.T, covariance, 1e-10)
    close(found.covariance_product(unit_vectors(), tau, scale=scale).flatten(1), covariance, 1e-10)
    expected = float(torch.linalg.slogdet(precision).logabsdet)
    assert float(found.log_determinant(tau, scale=scale)) == pytest.approx(expected, rel=0, abs=1e-10)


def test_full_rank_is_ekfac() -> None:
    """With every eigenpair kept, V diag(lam) V^T is EKFAC, whose diagonal correction is what remains."""
    f = layer()
    found = approximation(f, WEIGHTS)
    ekfac = f.basis() @ f.eigenvalues.flatten().diag() @ f.basis().T
    close(found.dense(TAU) - found.diagonal.flatten().diag() - TAU * torch.eye(WEIGHTS).double(), ekfac)


def test_a_curvature_of_that_form_is_recovered() -> None:
    """F = V diag(lam) V^T exactly, of rank 3: no correction, and P is F + tau I."""
    f = layer()
    eigenvalues = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    eigenvalues[3, 4], eigenvalues[0, 4], eigenvalues[2, 1] = 9.0, 4.0, 1.0
    ggn = f.basis() @ eigenvalues.flatten().diag() @ f.basis().T
    found = approximation(Layer(ggn, f.left, f.right, eigenvalues), 3)
    assert float(found.unclamped_diagonal.abs().max()) < 1e-14
    close(found.dense(TAU), ggn + TAU * torch.eye(WEIGHTS).double())
    assert found.left.shape == (D_OUT, 3) and found.right.shape == (D_IN, 2)  # only the columns in use


def test_batches_of_noise_and_a_change_of_precision() -> None:
    """A batch is draw by draw the same; another tau is never served from the last one's factorization."""
    found = approximation(layer(), 5)
    noise = torch.randn(2, 3, D_OUT, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = found.draw(noise, TAU)
    assert first.shape == noise.shape
    torch.testing.assert_close(found.draw(noise[1, 2], TAU), first[1, 2])
    assert not torch.allclose(found.draw(noise, 2.0), first)
    assert not torch.allclose(found.draw(noise, TAU, scale=2.0), first)
    assert torch.equal(found.draw(noise, TAU), first)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = approximation(layer(), 7).covariance_product(unit_vectors(), TAU)
    monkeypatch.setattr(inf, "_CHUNK", 2 * WEIGHTS)
    torch.testing.assert_close(approximation(layer(), 7).covariance_product(unit_vectors(), TAU), whole)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_identity_bases(side: str) -> None:
    """None stands for the identity, as an Embedding's one-hot inputs have it."""
    f, eyes = layer(), [torch.eye(D_OUT, dtype=torch.float64), torch.eye(D_IN, dtype=torch.float64)]
    bases = [f.left, f.right]
    none: list[Tensor | None] = list(bases)
    for index, name in enumerate(("left", "right")):
        if side in (name, "both"):
            bases[index], none[index] = eyes[index], None
    basis = torch.kron(bases[0].contiguous(), bases[1].contiguous())
    eigenvalues = (basis.T @ f.ggn @ basis).diagonal().reshape(D_OUT, D_IN)
    found = LowRankPlusDiagonal.from_ekfac(none[0], none[1], eigenvalues, f.diagonal, 6)
    close(found.dense(TAU), dense_by_hand(Layer(f.ggn, bases[0], bases[1], eigenvalues), 6, TAU, 1.0))


def test_zero_curvature_is_the_prior() -> None:
    zero = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    found = LowRankPlusDiagonal.from_ekfac(None, None, zero, zero, 2)
    torch.testing.assert_close(found.draw(unit_vectors(), 4.0), 0.5 * unit_vectors())
    assert float(found.log_determinant(4.0)) == pytest.approx(WEIGHTS * math.log(4.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"`rank` must lie in \[1, 20\], got 0"),
        ({"rank": WEIGHTS + 1}, "got 21"),
        ({"left": torch.eye(3)}, r"`left` must have shape \(4, 4\) or be None, got \(3, 3\)"),
        ({"right": torch.eye(4)}, r"`right` must have shape \(5, 5\)"),
        ({"diagonal": torch.ones(5, 4)}, r"`diagonal` must have shape \(4, 5\), got \(5, 4\)"),
        ({"eigenvalues": torch.ones(1, 4, 5)}, r"`eigenvalues` must have shape \(d_out, d_in\)"),
        ({"eigenvalues": -torch.ones(4, 5)}, "`eigenvalues` must be finite and >= 0, got a minimum of -1"),
        ({"diagonal": torch.full((4, 5), math.nan)}, "`diagonal` must be finite"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    f = layer()
    arguments: dict[str, Any] = {**f._asdict(), "diagonal": f.diagonal, "rank": 3, **changes}
    del arguments["ggn"]
    with pytest.raises(ValueError, match=message):
        LowRankPlusDiagonal.from_ekfac(**arguments)


def test_wrong_precisions_and_shapes() -> None:
    found = approximation(layer(), 3)
    for tau, scale, name in ((0.0, 1.0, "tau"), (math.nan, 1.0, "tau"), (1.0, 0.0, "scale")):
        for call in (found.log_determinant, found.dense):
            with pytest.raises(ValueError, match=f"`{name}` must be finite and > 0"):
                call(tau, scale=scale)
    with pytest.raises(ValueError, match=r"`noise` must have shape \(\.\.\., 4, 5\), got \(5, 4\)"):
        found.draw(torch.zeros(5, 4), TAU)
    with pytest.raises(ValueError, match="`x` must have shape"):
        found.covariance_product(torch.zeros(20), TAU)
