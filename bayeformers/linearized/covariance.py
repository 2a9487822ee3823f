"""S = J Sigma J^T of one block, from what its layers saw: pure tensor algebra, (n, B, C, C) for n posteriors."""

from __future__ import annotations

import torch
from torch import Tensor

from .separable import Separable, rotated

_CHUNK_ELEMENTS = 2**20  # of one layer's per-example Jacobians: 4 MiB in float32, about a processor's cache


def separable_covariance(
    inputs: Tensor, gradients: Tensor, left: Tensor, right: Tensor, separable: Separable
) -> Tensor:
    """S_cd = sum_r sum_tu [(p_r * ghat_ct) . ghat_du] [(q_r * ahat_t) . ahat_u]: T x T Gram matrices instead of N.

    Args:
        inputs: a, (1, B, T, d_in').
        gradients: g, (1, B, C, T, d_out).
        left: U_G, (1, d_out, d_out).
        right: U_A, (1, d_in', d_in').
        separable: V; S is a sum of squares weighted by it, so the result has its relative error.

    Returns:
        The covariance S, (1, B, C, C).
    """
    count, positions = gradients.shape[2:4]
    inner = separable.columns_side.grams(inputs[0], right, separable.columns)  # (B, R, T, T)
    outer = separable.rows_side.grams(gradients[0].flatten(1, 2), left, separable.rows)
    outer = outer.view(len(inner), -1, count, positions, count, positions)
    return torch.einsum("brctdu,brtu->bcd", outer, inner).unsqueeze(0)


def affine_covariance(
    inputs: Tensor, gradients: Tensor, left: Tensor | None, right: Tensor | None, variances: Tensor
) -> Tensor:
    """S_cd = sum_ij N_c,ij N_d,ij V_ij with N_c = sum_t (U_G^T g_ct)(U_A^T a_t)^T.

    Args:
        inputs: a, (K, B, T, d_in'); what `reached` leaves has fewer positions, often one.
        gradients: g, (K, B, C, T, d_out).
        left: U_G, (K, d_out, r); None: the identity.
        right: U_A, (K, d_in', q); None: the identity.
        variances: V, (n, K, r, q).

    Returns:
        The covariances S, (n, B, C, C).
    """
    inputs, gradients = rotated(inputs, right), rotated(gradients, left)
    if inputs.shape[2] == 1:
        return _one_position(inputs[:, :, 0], gradients[:, :, :, 0], variances)
    size = max(1, _CHUNK_ELEMENTS // max(1, gradients.shape[2] * variances[0].numel()))
    parts = [
        jacobian_covariance(_jacobian(inputs[:, i : i + size], gradients[:, i : i + size]), variances)
        for i in range(0, inputs.shape[1], size)
    ]
    return torch.cat(parts, dim=1)


def affine_coordinates(inputs: Tensor, gradients: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return N_c = sum_t (U_G^T g_ct)(U_A^T a_t)^T, (K, B, C, r, q).

    Args:
        inputs: a, (K, B, T, d_in').
        gradients: g, (K, B, C, T, d_out).
        left: U_G, (K, d_out, r); None: the identity.
        right: U_A, (K, d_in', q); None: the identity.
    """
    inputs, gradients = reached(inputs, gradients)
    return _jacobian(rotated(inputs, right), rotated(gradients, left))


def jacobian_covariance(jacobian: Tensor, variances: Tensor) -> Tensor:
    """sum_ij M_c,ij M_d,ij V_ij; M (K, B, C, d_out, d_in'), V (n, K, d_out, d_in') -> (n, B, C, C)."""
    rows = jacobian.movedim(0, 2).flatten(2)  # (B, C, K d_out d_in')
    flat = variances.flatten(1)
    if len(flat) == 1:
        return torch.bmm(rows * flat[0], rows.mT).unsqueeze(0)
    count = rows.shape[1]
    covariance = rows.new_empty(len(flat), len(rows), count, count)
    for c in range(count):
        products = rows[:, c : c + 1] * rows[:, c:]  # each pair once
        covariance[:, :, c, c:] = torch.einsum("bdp,np->nbd", products, flat)
        covariance[:, :, c:, c] = covariance[:, :, c, c:]
    return covariance


def table_covariance(ids: Tensor, gradients: Tensor, right: Tensor | None, variances: Tensor) -> Tensor:
    """The same for a table: a row looked up at several positions has one noise, so its gradients are added first.

    Args:
        ids: the rows looked up, (1, B, T).
        gradients: g, (1, B, C, T, d).
        right: U_A, (1, d, d); None: the identity.
        variances: V, (n, 1, rows, d).

    Returns:
        The covariances S, (n, B, C, C).
    """
    looked_up, turned = ids[0], rotated(gradients, right)[0]
    same = (looked_up[:, :, None] == looked_up[:, None, :]).to(turned.dtype)
    summed = torch.einsum("bts,bcsd->bctd", same, turned).flatten(2).mT
    return torch.stack([torch.bmm((turned * v[0, looked_up][:, None]).flatten(2), summed) for v in variances])


def table_squares(ids: Tensor, gradients: Tensor, rows: int) -> Tensor:
    """Sum over examples and outputs of the squared Jacobian of a table; a row's gradients add first.

    Args:
        ids: the rows looked up, (B, T).
        gradients: g, (B, C, T, d).
        rows: how many rows the table has.

    Returns:
        The diagonal of J^T J, (1, rows, d).
    """
    same = ids[:, :, None] == ids[:, None, :]
    is_first = ~same.tril(-1).any(-1)
    summed = torch.einsum("bts,bcsd->bctd", same.to(gradients.dtype), gradients)
    squares = (summed.square().sum(1) * is_first[..., None]).flatten(0, 1)
    return squares.new_zeros(rows, squares.shape[1]).index_add_(0, ids.flatten(), squares).unsqueeze(0)


def affine_products(inputs: Tensor, gradients: Tensor, matrix: Tensor) -> Tensor:
    """Return J eta = sum_t g_ct . (eta a_t), (B, C), for one direction eta of the weights.

    Args:
        inputs: a, (K, B, T, d_in').
        gradients: g, (K, B, C, T, d_out).
        matrix: eta, (K, d_out, d_in').
    """
    moved = torch.einsum("kbtj,kij->kbti", inputs, matrix)
    return torch.einsum("kbcti,kbti->bc", gradients, moved)


def reached(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Only positions with a gradient: not padding, and in a last layer often the first token alone."""
    if bool(gradients[..., 0].ne(0).any(2).any(1).any(0).all()):  # of most positions the first element tells
        return inputs, gradients
    kept = gradients.ne(0).any(-1).any(2).any(1).any(0)
    if bool(kept.all()):
        return inputs, gradients
    kept[0] |= ~kept.any()
    return inputs[:, :, kept], gradients[:, :, :, kept]


def _one_position(a: Tensor, g: Tensor, variances: Tensor) -> Tensor:
    """S = sum_i g_c,i g_d,i r_i with r_i = sum_j a_j^2 V_ij: no tensor of d_out x d_in' elements per example."""
    weights = torch.einsum("kbj,nkij->nkbi", a.square(), variances)
    return torch.einsum("kbci,nkbi,kbdi->nbcd", g, weights, g)


def _jacobian(inputs: Tensor, gradients: Tensor) -> Tensor:
    """M_c = sum_t g_ct a_t^T: (K, B, C, d_out, d_in')."""
    return torch.matmul(gradients.mT, inputs.unsqueeze(2))
