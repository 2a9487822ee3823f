"""Each function of `posteriors.covariance` against one einsum over all of its indices, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayeformers.linearized import covariance as module
from bayeformers.linearized.covariance import (
    affine_covariance,
    affine_products,
    jacobian_covariance,
    reached,
    separable_covariance,
    table_covariance,
    table_squares,
)
from bayeformers.linearized.separable import MAX_RANK, Separable, Side

BATCH, COUNT, D_OUT, D_IN = 5, 3, 4, 6
SHAPES = pytest.mark.parametrize(
    ("blocks", "posteriors", "positions"), [(1, 1, 1), (1, 3, 1), (2, 1, 1), (2, 3, 1), (1, 1, 7), (1, 3, 7), (2, 3, 7)]
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthogonal(blocks: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(blocks, size, size))[0]


def captured(blocks: int, positions: int) -> tuple[Tensor, Tensor]:
    return normal(blocks, BATCH, positions, D_IN), normal(blocks, BATCH, COUNT, positions, D_OUT)


def brute_force(inputs: Tensor, gradients: Tensor, left: Tensor, right: Tensor, variances: Tensor) -> Tensor:
    """sum over k, the positions t and u, and the directions i and j."""
    g, a = torch.einsum("kbctp,kpi->kbcti", gradients, left), torch.einsum("kbtq,kqj->kbtj", inputs, right)
    return torch.einsum("kbcti,kbtj,nkij,kbdui,kbuj->nbcd", g, a, variances, g, a)


def assert_between(low: Tensor, high: Tensor, slack: float = 1e-10) -> None:
    """low <= high in the order of positive matrices, but for rounding."""
    assert float(torch.linalg.eigvalsh(high - low).min()) >= -slack * float(high.abs().max())


@SHAPES
@pytest.mark.parametrize("has_left", [True, False])
@pytest.mark.parametrize("has_right", [True, False])
def test_affine_covariance(blocks: int, posteriors: int, positions: int, has_left: bool, has_right: bool) -> None:
    inputs, gradients = captured(blocks, positions)
    left = orthogonal(blocks, D_OUT) if has_left else None
    right = orthogonal(blocks, D_IN) if has_right else None
    variances = torch.rand(posteriors, blocks, D_OUT, D_IN).double()
    found = affine_covariance(inputs, gradients, left, right, variances)
    bases = [torch.eye(d).double().expand(blocks, d, d) for d in (D_OUT, D_IN)]
    left, right = bases[0] if left is None else left, bases[1] if right is None else right
    torch.testing.assert_close(found, brute_force(inputs, gradients, left, right, variances))


@SHAPES
def test_some_columns_of_the_bases(blocks: int, posteriors: int, positions: int) -> None:
    inputs, gradients = captured(blocks, positions)
    left, right = orthogonal(blocks, D_OUT)[..., :2], orthogonal(blocks, D_IN)[..., 1:4]
    variances = torch.rand(posteriors, blocks, 2, 3).double()
    found = affine_covariance(inputs, gradients, left, right, variances)
    torch.testing.assert_close(found, brute_force(inputs, gradients, left, right, variances))


@pytest.mark.parametrize("elements", [1, 100, 200])
def test_chunks_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, gradients = captured(2, 7)
    variances = torch.rand(3, 2, D_OUT, D_IN).double()
    whole = affine_covariance(inputs, gradients, None, None, variances)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(affine_covariance(inputs, gradients, None, None, variances), whole)


@pytest.mark.parametrize("kept", [[], [0], [2, 5], list(range(7))])
def test_positions_without_a_gradient(kept: list[int]) -> None:
    """Left out, though one stays where there are none: the result is 0, of the right shape."""
    inputs, gradients = captured(2, 7)
    is_kept = torch.zeros(7).index_fill(0, torch.tensor(kept, dtype=torch.long), 1)
    gradients = gradients * is_kept[:, None]
    variances, eyes = torch.rand(3, 2, D_OUT, D_IN).double(), [torch.eye(d).double().expand(2, d, d) for d in (4, 6)]
    torch.testing.assert_close(
        affine_covariance(inputs, gradients, None, None, variances), brute_force(inputs, gradients, *eyes, variances)
    )
    assert [part.shape[dim] for part, dim in zip(reached(inputs, gradients), (2, 3), strict=True)] == [
        max(1, len(kept))
    ] * 2


def test_a_position_that_one_example_needs_stays() -> None:
    inputs, gradients = captured(1, 2)
    gradients[:, :-1, :, 1] = 0
    assert reached(inputs, gradients)[0].shape[2] == 2


@pytest.mark.parametrize("posteriors", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
def test_jacobian_covariance(blocks: int, posteriors: int) -> None:
    matrix, variances = normal(blocks, BATCH, COUNT, D_OUT, D_IN), torch.rand(posteriors, blocks, D_OUT, D_IN).double()
    expected = torch.einsum("kbcij,kbdij,nkij->nbcd", matrix, matrix, variances)
    torch.testing.assert_close(jacobian_covariance(matrix, variances), expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_affine_products(blocks: int) -> None:
    inputs, gradients = captured(blocks, 7)
    eta = normal(blocks, D_OUT, D_IN)
    expected = torch.einsum("kbcti,kij,kbtj->bc", gradients, eta, inputs)
    torch.testing.assert_close(affine_products(inputs, gradients, eta), expected)


@pytest.mark.parametrize("has_basis", [True, False])
@pytest.mark.parametrize("posteriors", [1, 3])
@pytest.mark.parametrize("positions", [1, 6])
def test_tables(positions: int, posteriors: int, has_basis: bool) -> None:
    """As a layer of one-hot inputs: rows that a text repeats have one noise."""
    rows, ids = 4, torch.randint(4, (1, BATCH, positions))
    gradients = normal(1, BATCH, COUNT, positions, D_IN)
    right = orthogonal(1, D_IN) if has_basis else None
    variances = torch.rand(posteriors, 1, rows, D_IN).double()
    one_hot = torch.nn.functional.one_hot(ids[0], rows).double()
    jacobian = torch.einsum("btv,bctd->bcvd", one_hot, gradients[0])
    rotated = jacobian if right is None else jacobian @ right[0]
    expected = torch.einsum("bcvd,bevd,nvd->nbce", rotated, rotated, variances[:, 0])
    torch.testing.assert_close(table_covariance(ids, gradients, right, variances), expected)
    squares = table_squares(ids[0], gradients[0], rows)
    torch.testing.assert_close(squares, jacobian.square().sum((0, 1)).unsqueeze(0))


# -------------------------------------------------------------------------------------------------- separable variances


def known(orders: float, tau: float = 1.0, sizes: tuple[int, int] = (40, 60)) -> Tensor:
    """1 / (gamma_i alpha_j + tau), of factors whose eigenvalues fall over ``orders`` orders of magnitude."""
    gamma, alpha = (torch.logspace(2, 2 - orders, size, dtype=torch.float64) for size in sizes)
    return 1 / (torch.outer(gamma, alpha) + tau)


@pytest.mark.parametrize("tau", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("orders", [0.0, 4.0, 8.0])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-4])
def test_every_variance_is_within_the_tolerance(tolerance: float, orders: float, tau: float) -> None:
    variances = known(orders, tau)
    separable = Separable.from_variances(variances, tolerance)
    assert separable is not None and len(separable.rows) <= MAX_RANK
    error = separable.rows.mT @ separable.columns / variances - 1
    assert float(error.abs().max()) <= tolerance * (1 + 1e-9)


def test_variances_without_structure_are_refused() -> None:
    assert Separable.from_variances(torch.rand(40, 60, dtype=torch.float64) + 0.1, 1e-3) is None
    assert Separable.from_variances(known(12.0), 0.0) is None


@pytest.mark.parametrize("value", [1e-12, 1.0, 1e12])
def test_equal_variances_are_one_term(value: float) -> None:
    separable = Separable.from_variances(torch.full((4, 6), value, dtype=torch.float64), 1e-12)
    assert separable is not None and len(separable.rows) == 1


def separable_case(positions: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, gradients = normal(1, BATCH, positions, 60), normal(1, BATCH, COUNT, positions, 40)
    return inputs, gradients, orthogonal(1, 40), orthogonal(1, 60), known(8.0)


@pytest.mark.parametrize("positions", [1, 2, 7])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_separable_covariance(positions: int, tolerance: float) -> None:
    """(1 - tolerance) S <= found <= (1 + tolerance) S in the order of positive matrices, for S sums squares times V."""
    inputs, gradients, left, right, variances = separable_case(positions)
    separable = Separable.from_variances(variances, tolerance)
    assert separable is not None
    found = separable_covariance(inputs, gradients, left, right, separable)
    exact = brute_force(inputs, gradients, left, right, variances[None, None])
    assert found.shape == exact.shape
    assert_between((1 - tolerance) * exact, found)
    assert_between(found, (1 + tolerance) * exact)
    if tolerance == 1e-1:
        assert not torch.allclose(found, exact, rtol=1e-6)


def test_separable_examples_alone_are_the_same() -> None:
    inputs, gradients, left, right, variances = separable_case(7)
    separable = Separable.from_variances(variances, 1e-3)
    assert separable is not None
    whole = separable_covariance(inputs, gradients, left, right, separable)
    for b in range(BATCH):
        alone = separable_covariance(inputs[:, b : b + 1], gradients[:, b : b + 1], left, right, separable)
        torch.testing.assert_close(whole[:, b : b + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e2])
def test_only_directions_with_a_variance_of_their_own_are_rotated_into(strength: float, dtype: torch.dtype) -> None:
    """6 of 64 and 20 of 96, the others nearly as the prior has them; with kept columns of the bases and without."""
    left, right = orthogonal(1, 64), orthogonal(1, 96)
    gamma, alpha = (torch.rand(size, dtype=torch.float64) * 1e-7 for size in (64, 96))
    gamma[:6], alpha[10:30] = strength, torch.linspace(0.1, 1, 20, dtype=torch.float64)
    variances = 1 / (torch.outer(gamma, alpha) + 1)
    separable = Separable.from_variances(variances.to(dtype), 1e-3)
    assert separable is not None
    own = [side.own for side in (separable.rows_side, separable.columns_side)]
    assert [None if x is None else x.tolist() for x in own] == (
        [[], []] if strength < 1e-3 else [list(range(6)), list(range(10, 30))]
    )
    inputs, gradients = normal(1, BATCH, 7, 96), normal(1, BATCH, COUNT, 7, 64)
    exact = brute_force(inputs, gradients, left, right, variances[None, None])
    tensors = [tensor.to(dtype) for tensor in (inputs, gradients, left, right)]
    for one in (separable, separable.with_bases(*tensors[2:])):
        found = separable_covariance(*tensors, one)  # type: ignore[arg-type]
        # the tolerance of every sum of squares, which S is; rounding of float32 is far below it here
        assert_between((1 - 1e-3) * exact, found.double(), slack=1e-5)
        assert_between(found.double(), (1 + 1e-3) * exact, slack=1e-5)


def test_where_most_variances_differ_all_directions_are_rotated_into() -> None:
    separable = Separable.from_variances(known(8.0), 1e-3)
    assert separable is not None and separable.rows_side.own is None and separable.columns_side.own is None
    assert separable.with_bases(orthogonal(1, 40), orthogonal(1, 60)).rows_side.basis is None


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("strength", [1.0, 1e2, 1e4, 1e6, 1e8])
def test_float32(strength: float, inside: bool) -> None:
    """Exact or refused: of variances over many decades, the terms cancel, and S may be far below the prior's."""
    left, right = orthogonal(1, 64), orthogonal(1, 96)
    gamma, alpha = strength * (torch.arange(64) < 6).double(), (torch.arange(96) < 20).double()
    variances = 1 / (torch.outer(gamma, alpha) + 1)
    inputs, gradients = normal(1, BATCH, 7, 96), normal(1, BATCH, COUNT, 7, 64)
    if inside:
        inputs, gradients = inputs @ right[..., :20] @ right[..., :20].mT, gradients @ left[..., :6] @ left[..., :6].mT
    exact = brute_force(inputs, gradients, left, right, variances[None, None])
    separable = Separable.from_variances(variances.float(), 1e-3)
    assert (separable is None) == (strength >= 1e5)  # 2 eps strength > 10 tolerance
    if separable is None:
        return
    narrow = [tensor.float() for tensor in (inputs, gradients, left, right)]
    found = separable_covariance(*narrow, separable)  # type: ignore[arg-type]
    # the tolerance of the sum, and ten times that for rounding
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1.1e-2 * float(exact.abs().max()))


def test_it_pays_for_few_positions() -> None:
    def pays(positions: int, size: int) -> bool:
        separable = Separable(torch.ones(10, size), torch.ones(10, size))
        return separable.pays(torch.empty(1, 2, positions, size), torch.empty(1, 2, 2, positions, size))

    assert pays(4, 768) and not pays(512, 64)


@pytest.mark.parametrize("own", [None, [], [1, 4]])
def test_grams_of_one_side(own: list[int] | None) -> None:
    """Against the sum over all directions, two weightings of five vectors; all but ``own`` have one weight."""
    basis, vectors, weights = orthogonal(1, 6), normal(BATCH, 5, 6), normal(2, 6)
    if own is not None:
        shared = [i for i in range(6) if i not in own]
        weights[:, shared] = weights[:, shared[:1]]
    side = Side() if own is None else Side(torch.tensor(own, dtype=torch.long), common=0)
    turned = torch.einsum("bpd,di->bpi", vectors, basis[0])
    exact = torch.einsum("ri,bpi,bqi->brpq", weights, turned, turned)
    for one in (side, side.with_basis(basis)):
        torch.testing.assert_close(one.grams(vectors, basis, weights), exact, rtol=0, atol=1e-12)


def test_it_pays_the_more_the_fewer_directions_have_a_weight_of_their_own() -> None:
    """At 100 positions of 256 x 256, ten terms: not with all directions, but with 4 of each side."""
    few = Side(torch.arange(4), common=10)
    tensors = torch.empty(1, 2, 100, 256), torch.empty(1, 2, 1, 100, 256)
    sides = (Side(), Side()), (few, few)
    assert [Separable(torch.ones(10, 256), torch.ones(10, 256), *own).pays(*tensors) for own in sides] == [False, True]


@pytest.mark.parametrize("first_element", [0.0, 1.0])
def test_reached_positions(first_element: float) -> None:
    """Of gradients whose first element is 0 everywhere too."""
    inputs, gradients = captured(1, 4)
    gradients[..., 0] *= first_element
    found = reached(inputs, gradients)
    assert torch.equal(found[0], inputs) and torch.equal(found[1], gradients)
    gradients[:, :, :, 1] = 0
    found = reached(inputs, gradients)
    kept = [0, 2, 3]
    assert torch.equal(found[0], inputs[:, :, kept]) and torch.equal(found[1], gradients[:, :, :, kept])
