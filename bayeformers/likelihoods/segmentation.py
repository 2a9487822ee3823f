"""Classes of pixels: logits are channel first and coarser than the labels."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..forward import labels_of, logits_of
from .base import Batch, ItemNLL, Scores
from .classes import Categorical, cross_entropy

__all__ = ["CONFIDENCE", "IGNORED_PIXEL", "WRONG", "SemanticSegmentation", "resized"]

IGNORED_PIXEL = 255
"""transformers' default for a pixel without a class."""

CONFIDENCE, WRONG = "confidence", "wrong"
"""Scores of pixels, whose probabilities are too many to gather."""


class SemanticSegmentation(Categorical):
    """A class of every pixel: logits (B, C, H, W), values (B, H, W, C), labels (B, H', W')."""

    problem_type = "semantic_segmentation"
    family = None
    fits_other = True
    is_per_pixel = True
    has_many_items = True
    has_item_logits = False
    is_linearizable = False

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return the NLL of each pixel in nats, (B, H', W'), of logits interpolated bilinearly to the labels' size.

        Args:
            outputs: what the model returned, with logits (B, C, H, W).
            batch: what its forward took, with labels (B, H', W'); those of -100 do not count.
            noise_std: ignored, as classes have no noise.

        Raises:
            ValueError: the labels have another number of axes or of images.
        """
        log_probs, labels = self.values(outputs, batch), labels_of(batch)
        if labels.dim() != 3 or len(labels) != len(log_probs):
            raise ValueError(
                f"`labels` must have shape ({len(log_probs)}, H, W), a class per pixel, got {tuple(labels.shape)}."
            )
        return cross_entropy(resized(log_probs, (labels.shape[1], labels.shape[2])), labels)

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return the log-probabilities, (B, H, W, C), at the logits' resolution.

        Args:
            output: what the model returned, with logits (B, C, H, W).
            batch: what its forward took, which does not matter here.
            is_stacked: ignored, as several draws at once are not supported here.

        Raises:
            ValueError: the logits have another number of axes, or one class only.
        """
        logits = logits_of(output)
        if logits.dim() != 4 or logits.shape[1] < 2:
            raise ValueError(
                f"`logits` of a segmentation must have shape (B, C, H, W) with C >= 2 classes, got "
                f"{tuple(logits.shape)}."
            )
        return logits.movedim(1, -1).log_softmax(dim=-1)

    def predictions(self, log_probs: Tensor) -> Any:
        """Channel first, as stock recipes take them."""
        return log_probs.movedim(-1, 1).contiguous()

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """Every pixel's probabilities would not fit in memory: what metrics need of them is computed here."""
        if batch.get("labels") is None:
            return None
        labels = labels_of(batch)
        nll, mask = cross_entropy(log_probs, labels)
        probs, classes = log_probs.exp(), labels.masked_fill(~mask, 0).long()
        confidence, decision = probs.max(-1)
        of_label = probs.gather(-1, classes[..., None]).squeeze(-1)
        brier = probs.square().sum(-1) - 2 * of_label + 1
        return {"nll": nll, "brier": brier, CONFIDENCE: confidence, WRONG: (decision != classes).byte()}, mask


def resized(log_probs: Tensor, size: tuple[int, int]) -> Tensor:
    """Log-probabilities of one draw at another resolution, (..., H, W, C) -> (..., H', W', C)."""
    # As the models' own losses do it: logits are interpolated bilinearly, then normalised. What distinguishes
    # log-probabilities from logits is the same for all classes of a pixel, so it drops out.
    if tuple(log_probs.shape[-3:-1]) == tuple(size):
        return log_probs
    channel_first = log_probs.movedim(-1, -3)
    flat = F.interpolate(channel_first.flatten(0, -4), size=size, mode="bilinear", align_corners=False)
    return flat.reshape(*channel_first.shape[:-2], *size).movedim(-3, -1).log_softmax(-1)
