"""The start and the end of an answer: two softmaxes over the positions of one sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import attended_positions, labels_of, logits_of
from .base import Batch, ItemNLL, Likelihood, Scores
from .classes import cross_entropy

__all__ = ["QuestionAnswering"]

_SIDES = ("start", "end")


class QuestionAnswering(Likelihood):
    """Two softmaxes (B, T); an item is a feature, of which one end lies on a token that is attended to."""

    problem_type = "question_answering"
    label_names = ("start_positions", "end_positions")
    may_be_unlabelled = True
    is_linearizable = False

    def item_mask(self, batch: Batch) -> Tensor:
        """Features with an answer in their text."""
        main = batch["inputs_embeds"] if batch.get("input_ids") is None else batch["input_ids"]
        start, end = (span_end(batch, side, main.shape[1])[1] for side in _SIDES)
        return start | end

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return start NLL + end NLL over attended positions in nats, (B,); an end outside them adds nothing.

        Args:
            outputs: what the model returned, with `start_logits` and `end_logits` (B, T).
            batch: what its forward took, with `start_positions` and `end_positions` (B,).
            noise_std: ignored, as positions have no noise.
        """
        parts = []
        for side in _SIDES:
            logits = logits_of(outputs, f"{side}_logits")
            positions, mask = span_end(batch, side, logits.shape[1])
            parts.append(cross_entropy(_attended(logits, batch), positions, mask, f"{side}_positions"))
        start, end = parts
        return ItemNLL(start.values + end.values, start.mask | end.mask)

    def mean_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Half the sum, as the heads take it: padding competes, and what is negative counts as the first position."""
        losses = []
        for side in _SIDES:
            logits, positions = outputs[f"{side}_logits"].float(), labels_of(batch, f"{side}_positions")
            outside = logits.shape[1]
            losses.append(F.cross_entropy(logits, positions.reshape(-1).clamp(0, outside), ignore_index=outside))
        return 0.5 * (losses[0] + losses[1])

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return the log-probabilities of start and end, (B, 2, T), over the positions that ``attention_mask`` admits.

        Args:
            output: what the model returned, with `start_logits` and `end_logits` (B, T).
            batch: what its forward took, with `attention_mask` (B, T) if it has one.
            is_stacked: ignored, as several draws at once are not supported here.
        """
        sides = [_attended(logits_of(output, f"{side}_logits"), batch) for side in _SIDES]
        return torch.stack(sides, dim=1).log_softmax(dim=-1)

    def outside(self, labels: Tensor, num_classes: int) -> Tensor:
        """A position beyond the sequence."""
        return labels >= num_classes

    def predictions(self, log_probs: Tensor) -> Any:
        """Start and end, (B, T) each."""
        return log_probs[:, 0].contiguous(), log_probs[:, 1].contiguous()

    def per_example(self, uncertainty: Tensor) -> Tensor:
        """Start and end are independent under one draw: their entropies add."""
        return uncertainty.sum(1)

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """The NLL alone."""
        if any(batch.get(name) is None for name in self.label_names):
            return None
        nll, mask = self.nll((log_probs[:, 0], log_probs[:, 1]), batch)
        return {"nll": nll}, mask


def span_end(batch: Batch, side: str, length: int) -> tuple[Tensor, Tensor]:
    """Return one end of the answer, (B,), and whether it lies on a token that is attended to, bool (B,).

    Args:
        batch: what the model's forward took, with labels.
        side: the end's name, "start" or "end".
        length: the number T of token positions.
    """
    positions = labels_of(batch, f"{side}_positions")
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    inside = (positions >= 0) & (positions < length)
    attended = attended_positions(batch, length)
    if attended is not None:
        inside = inside & attended.gather(1, positions.clamp(0, length - 1)[:, None]).squeeze(1)
    return positions, inside


def _attended(logits: Tensor, batch: Any) -> Tensor:
    """Else the distribution would depend on the padding, that is, on the rest of the batch."""
    attended = attended_positions(batch, logits.shape[-1])
    if attended is None or attended.shape != logits.shape:
        return logits
    return logits.masked_fill(~attended, -torch.inf)
