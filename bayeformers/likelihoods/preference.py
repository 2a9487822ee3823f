r"""Pairwise preferences: which of two answers is preferred (Bradley and Terry 1952, Biometrika 39(3/4), 324-345).

    P(chosen > rejected | r) = sigmoid(r_chosen - r_rejected - m)

of one score r per answer: a reward model's logit, or DPO's implicit reward beta log(pi / pi_ref) (Rafailov et al.
2023, arXiv 2305.18290, equation 7). A batch of B pairs has 2 B rows, the B chosen answers first, as trl's collators
make them; m is the pair's ``margin``, 0 where the batch has none. The item is the pair, and what was chosen is its
class 0, so there are no labels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import logits_of, tensors_in
from .base import Batch, ItemNLL, Likelihood, Scores
from .classes import Categorical, class_scores

__all__ = ["PairwisePreference"]


class PairwisePreference(Categorical):
    """Of two answers the chosen one; `problem_type="pairwise_preference"`, of a head with `num_labels` = 1."""

    problem_type = "pairwise_preference"
    family = None  # its logits are differences over rows, which Laplace's curvature per row is not of
    fits_sequences = True
    fits_other = True
    may_be_unlabelled = False
    has_stock_loss = False  # transformers has no loss of this kind
    has_item_logits = False
    is_linearizable = False
    links = ()

    def check_head(self, config: Any) -> None:
        """One score per answer."""
        if getattr(config, "num_labels", 1) != 1:
            raise ValueError(
                f"`config.num_labels` must be 1 for pairwise preferences, a score per answer, got {config.num_labels}."
            )

    def item_mask(self, batch: Batch) -> Tensor:
        """Every pair, (B,)."""
        rows = next(tensor for tensor in tensors_in(batch) if tensor.ndim > 1)
        return torch.ones(_half(len(rows), "rows of the batch"), dtype=torch.bool, device=rows.device)

    def margins(self, outputs: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return r_chosen - r_rejected - m.

        Args:
            outputs: what the model returned, with logits (2 B,) or (2 B, 1).
            batch: what its forward took, with a ``margin`` (B,) where there is one.
            is_stacked: whether the logits have an axis S of draws before the others.

        Returns:
            (B,), or (S, B).

        Raises:
            ValueError: the head has several logits, or the number of rows is odd.
        """
        logits = logits_of(outputs)
        if logits.dim() == 2 + is_stacked and logits.shape[-1] == 1:
            logits = logits.squeeze(-1)
        if logits.dim() != 1 + is_stacked:
            raise ValueError(
                f"`logits` of pairwise preferences must have shape (2 B, 1), one score per answer, got "
                f"{tuple(logits_of(outputs).shape)}."
            )
        size = _half(logits.shape[-1], "`logits`")
        difference = logits[..., :size] - logits[..., size:]
        margin = batch.get("margin") if hasattr(batch, "get") else None
        return difference if margin is None else difference - margin.to(difference)

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return -log sigmoid(r_chosen - r_rejected - m) of each pair, in nats.

        Args:
            outputs: what the model returned, with logits (2 B,) or (2 B, 1).
            batch: what its forward took.
            noise_std: ignored, as preferences have no noise.
        """
        values = -F.logsigmoid(self.margins(outputs, batch))
        return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return log P of "the chosen one is preferred" and of "the rejected one is", (B, 2).

        Args:
            output: what the model returned, with logits (2 B,) or (2 B, 1).
            batch: what its forward took, with a ``margin`` where there is one.
            is_stacked: whether the logits have an axis S of draws before the others.
        """
        margins = self.margins(output, batch, is_stacked=is_stacked)
        return torch.stack([F.logsigmoid(margins), F.logsigmoid(-margins)], dim=-1)

    log_normalizers = Likelihood.log_normalizers

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """Each pair's class is 0: the first of two answers is the one that was chosen."""
        labels = torch.zeros(len(log_probs), dtype=torch.long, device=log_probs.device)
        return class_scores(-log_probs[:, 0], log_probs, labels), torch.ones_like(labels, dtype=torch.bool)


def _half(rows: int, name: str) -> int:
    if rows % 2 or rows == 0:
        raise ValueError(
            f"The {name} must be an even number, the chosen answers and then as many rejected ones, got {rows}."
        )
    return rows // 2
