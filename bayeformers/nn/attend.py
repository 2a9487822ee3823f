"""Scaled dot-product attention of many heads, and its masks, as `torch.nn.MultiheadAttention` computes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    num_heads: int,
    dropout: float,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d) + mask) v per head, d = E / num_heads (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Shape: q (N, L, E), k and v (N, S, E), ``mask`` broadcastable to (N, H, L, S) -> (N, L, E), and the attention
    weights (N, H, L, S) if they are needed.
    """
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if not need_weights:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return heads.transpose(1, 2).flatten(2), None
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.mT
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return (weights @ v).transpose(1, 2).flatten(2), weights


def merged_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one to add to the scores (N, H, L, S): 0 or -inf for Booleans, floats as they are.

    Raises:
        ValueError: a mask of another shape.
    """
    examples, heads, queries, keys = shape
    merged = None
    if attn_mask is not None:
        if attn_mask.shape not in ((queries, keys), (examples * heads, queries, keys)):
            raise ValueError(
                f"`attn_mask` must have the shape {(queries, keys)} or {(examples * heads, queries, keys)}, got "
                f"{tuple(attn_mask.shape)}."
            )
        merged = _additive(attn_mask, dtype)
        merged = merged.view(examples, heads, queries, keys) if merged.dim() == 3 else merged.view(1, 1, queries, keys)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (examples, keys):
            raise ValueError(
                f"`key_padding_mask` must have the shape {(examples, keys)}, got {tuple(key_padding_mask.shape)}."
            )
        padding = _additive(key_padding_mask, dtype).view(examples, 1, 1, keys)
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"Masks must be Boolean or floating point, got {mask.dtype}.")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
