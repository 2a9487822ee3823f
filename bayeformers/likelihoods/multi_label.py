"""Several labels per example, each an independent Bernoulli of its own logit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import IGNORED, labels_of, logits_of
from .base import Batch, ItemNLL, Likelihood, Scores
from .classes import class_scores
from .gaussian import unit_columns
from .loss_hessian import Generators, uniform

__all__ = ["MultiLabel"]


class MultiLabel(Likelihood):
    """p(y_l = 1) = sigmoid(f_l), (B, L); predictions have two classes per label, absent and present."""

    problem_type = "multi_label_classification"
    family = "multilabel"
    fits_sequences = True
    has_item_logits = True
    is_bernoulli = True
    links = ("auto", "probit", "mc")

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return the NLL of each example in nats, (B,), summed over its labels.

        Args:
            outputs: what the model returned, with logits (B, L).
            batch: what its forward took, with labels (B, L) in [0, 1].
            noise_std: ignored, as labels have no noise.

        Raises:
            ValueError: the labels have another shape than the logits, or lie outside [0, 1].
        """
        logits, labels = logits_of(outputs), labels_of(batch)
        if labels.shape != logits.shape:
            raise ValueError(f"`labels` must have shape {tuple(logits.shape)}, got {tuple(labels.shape)}.")
        labels = labels.to(logits)
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError("`labels` of a multi-label head must lie in [0, 1]: one indicator per label.")
        values = self._losses(logits, labels).flatten(1).sum(1)
        return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))

    def mean_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Over an example's labels too."""
        return super().mean_loss(outputs, batch) / int(outputs["logits"].shape[-1])

    def other_means(self, outputs: Any, batch: Batch) -> Iterator[Tensor]:
        """ViLT's sums over the labels of an example: the likelihood itself."""
        yield super().mean_loss(outputs, batch)

    def labelled_logits(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each label as a two-class item of its own, with logits (0, f)."""
        logits = logits_of(outputs)
        return torch.stack([torch.zeros_like(logits), logits], dim=-1), (labels_of(batch) > 0.5).long()

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return the log-probabilities of absent and present, (B, L, 2).

        Args:
            output: what the model returned, with logits (B, L).
            batch: what its forward took, which does not matter here.
            is_stacked: whether there is an axis S of draws before the others, which changes nothing here.
        """
        logits = logits_of(output)
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)

    def class_numbers(self, labels: Tensor) -> Tensor:
        """Indicators may be floats, as transformers' losses take them."""
        is_indicator = labels.is_floating_point() and bool((labels == labels.round()).all())
        return super().class_numbers(labels.long() if is_indicator else labels)

    def predictions(self, log_probs: Tensor) -> Any:
        """The log odds, (B, L)."""
        return log_probs[..., 1] - log_probs[..., 0]

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """Every label is a binary example of its own."""
        if batch.get("labels") is None:
            return None
        nll, mask = self.nll(self.predictions(log_probs), batch)
        return class_scores(nll, log_probs, labels_of(batch)), mask

    # -- Laplace -----------------------------------------------------------------------------------------------------

    def _diverged(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """A logit of -inf is a label that cannot be."""
        extremes = values.amax(-1)
        return extremes, extremes.isnan() | extremes.isposinf()

    def _labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """(..., C) in [0, 1], or -100, which ignores that one label."""
        if labels.shape != values.shape:
            raise ValueError(
                f"`labels` must have shape {tuple(values.shape)} for a multi-label head, got {tuple(labels.shape)}."
            )
        labels = labels.to(values)
        wrong = ~((labels >= 0) & (labels <= 1)) & (labels != IGNORED)
        if bool(wrong.any()):
            raise ValueError(f"`labels` must be in [0, 1] or {IGNORED} (ignored), got {labels[wrong][0].item()}.")
        return labels

    def _columns(self, values: Tensor) -> Iterator[Tensor]:
        """sqrt(p_k (1 - p_k)) e_k."""
        # sqrt(p (1 - p)) by logarithms: p = 1 - 1e-12 is 1 in float32
        scale = (0.5 * (F.logsigmoid(values) + F.logsigmoid(-values))).exp()
        return (scale * unit for unit in unit_columns(values))

    def _gradient(self, values: Tensor, labels: Tensor) -> Tensor:
        """Probabilities less indicators."""
        return (values.sigmoid() - labels).masked_fill_(labels == IGNORED, 0.0)

    def _sampled(self, values: Tensor, generator: Generators) -> Tensor:
        """Of indicators yhat ~ Bernoulli(p)."""
        probs = values.sigmoid()
        numbers = uniform(probs, generator)
        return self._gradient(values, (numbers < probs.to(numbers.dtype)).to(probs))

    def _losses(self, values: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """One per label."""
        losses = F.binary_cross_entropy_with_logits(values, labels, reduction="none")
        return losses.masked_fill(labels == IGNORED, 0.0)
