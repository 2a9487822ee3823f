"""Inner products u^T Sigma v of per-example gradients, layer by layer: pure tensor algebra, (B1, B2) for all pairs.

With Sigma = U diag(V) U^T, U = U_G (x) U_A, and a gradient M = sum_t g_t a_t^T whose coordinates are N = U_G^T M U_A,

    vec(M1)^T Sigma vec(M2) = sum_ij N1_ij N2_ij V_ij.

Where both gradients have one position, N = h q^T with h = U_G^T g and q = U_A^T a, and with a product form
V = (1 / gamma) (x) (1 / alpha) the sum would factor into (h1^T h2 / gamma)(q1^T q2 / alpha). V = 1 / (L + tau) does not
factor; the pairs' products of h and of q, each a vector, still spare every d_out x d_in' tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Elements of an intermediate tensor: 64 MiB in float32."""


def one_position_inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], variances: Tensor) -> Tensor:
    """Return sum_kij (h1_i h2_i) V_ij (q1_j q2_j), (B1, B2), of gradients with one position each.

    Args:
        first: h1 (K, B1, d_out) and q1 (K, B1, d_in').
        second: h2 (K, B2, d_out) and q2 (K, B2, d_in').
        variances: the posterior variances V, (K, d_out, d_in').
    """
    (h1, q1), (h2, q2) = first, second
    size = _size(h2.shape[1] * sum(variances.shape[1:]) * len(variances))
    rows = []
    for start in range(0, h1.shape[1], size):
        part = slice(start, start + size)
        left = h1[:, part, None] * h2[:, None]  # (K, b, B2, d_out)
        right = q1[:, part, None] * q2[:, None]
        rows.append((torch.matmul(left, variances[:, None]) * right).sum((0, 3)))
    return torch.cat(rows)


def positions_inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], variances: Tensor) -> Tensor:
    """Return sum_kij N1_ij N2_ij V_ij with N = sum_t h_t q_t^T, (B1, B2), made chunk by chunk.

    Args:
        first: h (K, B1, T, d_out) and q (K, B1, T, d_in').
        second: the same of B2 examples, which may have another T.
        variances: the posterior variances V, (K, d_out, d_in').
    """

    def coordinates(pair: tuple[Tensor, Tensor]) -> Callable[[slice], Tensor]:
        return lambda part: torch.matmul(pair[0][:, part].mT, pair[1][:, part]).movedim(0, 1)

    counts = (first[0].shape[1], second[0].shape[1])
    return coordinates_inner(coordinates(first), coordinates(second), counts, variances)


def coordinates_inner(
    first: Callable[[slice], Tensor],
    second: Callable[[slice], Tensor],
    counts: tuple[int, int],
    variances: Tensor,
) -> Tensor:
    """Return sum_kij N1_kij N2_kij V_kij, (B1, B2); no more coordinates are held than of two chunks of examples.

    Args:
        first: from a slice of b examples to their coordinates N1, (b, K, d_out, d_in').
        second: the same for N2.
        counts: the numbers of examples, (B1, B2).
        variances: the posterior variances V, (K, d_out, d_in').
    """
    size = _size(variances.numel())
    rows = []
    for start in range(0, counts[0], size):
        left = (first(slice(start, min(start + size, counts[0]))) * variances).flatten(1)
        parts = [slice(other, min(other + size, counts[1])) for other in range(0, counts[1], size)]
        rows.append(torch.cat([left @ second(part).flatten(1).mT for part in parts], dim=1))
    return torch.cat(rows)


def table_inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], variances: Tensor) -> Tensor:
    """Return the sum over table rows that both examples look up, sum_tu [id_t = id_u] sum_j r1_tj r2_uj V_(id_t)j.

    Args:
        first: the row numbers (B1, T), and the gradients r1 (B1, T, d) in the basis of the features.
        second: the same of B2 examples.
        variances: the posterior variances V, (rows, d).
    """
    (ids1, r1), (ids2, r2) = first, second
    size = _size(ids1.shape[1] * ids2.numel())
    rows = []
    for start in range(0, len(ids1), size):
        ids = ids1[start : start + size]
        weighted = r1[start : start + size] * variances[ids]
        products = torch.einsum("btj,cuj->btcu", weighted, r2)
        rows.append((products * (ids[:, :, None, None] == ids2)).sum((1, 3)))
    return torch.cat(rows)


def _size(elements: int) -> int:
    """How many examples of so many elements are taken at once."""
    return max(1, CHUNK_ELEMENTS // max(1, elements))
