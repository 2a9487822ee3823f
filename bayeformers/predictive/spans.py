"""Start and end of an answer -> scores of whole spans."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..checks import is_whole

__all__ = ["span_scores"]


def span_scores(start: Tensor, end: Tensor, max_length: int, mask: Tensor | None = None) -> Tensor:
    """Return start_i + end_j of every span i..j of at most ``max_length`` tokens, (..., T, L).

    Entry [i, l] is the span of the l + 1 tokens i..i + l, -inf where there is none; L = min(max_length, T). Softmax
    over the last two axes gives p(span) ~ p(start) p(end), restricted to such spans; logits and log-probabilities give
    the same. Start and end are independent under one draw of the weights, but not on average: average after the
    softmax.

    Args:
        start: logits or log-probabilities of each start, (..., T).
        end: the same of each end, (..., T).
        max_length: the number of tokens that a span may have, >= 1.
        mask: True where a span may start and end, broadcastable to (..., T); None: anywhere.

    Raises:
        ValueError: ``start`` and ``end`` of different shapes or without positions, or ``max_length`` < 1.

    >>> import torch
    >>> start, end = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    >>> span_scores(start, end, max_length=2)
    tensor([[2., 3.],
            [1., 0.],
            [0., -inf]])
    """
    if start.shape != end.shape or start.dim() == 0 or start.shape[-1] == 0:
        raise ValueError(
            f"`start` and `end` must both have shape (..., T), T >= 1, got {tuple(start.shape)} and {tuple(end.shape)}."
        )
    if not is_whole(max_length) or max_length < 1:
        raise ValueError(f"`max_length` must be a whole number of tokens >= 1, got {max_length!r}.")
    if mask is not None:
        start, end = (side.masked_fill(~mask, float("-inf")) for side in (start, end))
    width = min(max_length, start.shape[-1])
    ends = F.pad(end, (0, width - 1), value=float("-inf")).unfold(-1, width, 1)  # (..., T, L): end[i + l]
    return start.unsqueeze(-1) + ends
