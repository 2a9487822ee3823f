"""Classes of pixels: logits are channel first and coarser than the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .problem import ProblemType, unwrapped

__all__ = ["IGNORED", "IGNORED_PIXEL", "ignored_label", "resized", "without_ignored"]

IGNORED = -100
IGNORED_PIXEL = 255
"""transformers' default for a pixel without a class."""


def ignored_label(model: nn.Module, problem_type: ProblemType) -> int:
    """The label that the model's own loss ignores: -100, and 255 of pixels unless the configuration says another."""
    if problem_type != "semantic_segmentation":
        return IGNORED
    config = getattr(unwrapped(model), "config", None)
    found = (getattr(config, name, None) for name in ("semantic_loss_ignore_index", "loss_ignore_index"))
    return next((int(value) for value in found if value is not None), IGNORED_PIXEL)


def without_ignored(inputs: Mapping[str, Any], model: nn.Module, problem_type: ProblemType) -> Mapping[str, Any]:
    """A batch in which pixels without a class have the label -100, as tokens have; other batches as they are."""
    labels = inputs.get("labels")
    if problem_type != "semantic_segmentation" or not isinstance(labels, Tensor):
        return inputs
    return {**inputs, "labels": labels.masked_fill(labels == ignored_label(model, problem_type), IGNORED)}


def resized(log_probs: Tensor, size: tuple[int, int]) -> Tensor:
    """Log-probabilities of one draw at another resolution, (..., H, W, C) -> (..., H', W', C).

    As the models' own losses do it: logits are interpolated bilinearly, then normalised. What distinguishes
    log-probabilities from logits is the same for all classes of a pixel, so it drops out.

    >>> import torch
    >>> resized(torch.randn(2, 4, 4, 3).log_softmax(-1), (8, 6)).shape
    torch.Size([2, 8, 6, 3])
    """
    if tuple(log_probs.shape[-3:-1]) == tuple(size):
        return log_probs
    channel_first = log_probs.movedim(-1, -3)
    flat = F.interpolate(channel_first.flatten(0, -4), size=size, mode="bilinear", align_corners=False)
    return flat.reshape(*channel_first.shape[:-2], *size).movedim(-3, -1).log_softmax(-1)
