"""`Likelihood`: what a head's outputs f say about its labels, p(y | f). One class per problem type.

Training (each item's NLL, which items count), evaluation (what is reported of a batch), Laplace (the Hessian of
-log p in f) and predictions ask this object and compare no names. A new kind of head is one subclass in one file, and
its row in `registry`; one over classes inherits all but its formula from `classes.Categorical`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..forward import batch_size, tensors_in
from .loss_hessian import LossHessian

__all__ = ["Batch", "ItemNLL", "Likelihood", "Scores"]

Batch = Mapping[str, Any]
Scores = tuple[dict[str, Tensor], Tensor]
"""By name, per item: "nll", and of few classes "probs" and "labels"; and the mask of the items that count."""


class ItemNLL(NamedTuple):
    """``values`` in nats, 0 where ``mask`` is False; both of the items' shape: (B,), (B, T) or (B, H, W)."""

    values: Tensor
    mask: Tensor

    def sum(self) -> Tensor:
        """The scalar sum over the items, with gradient."""
        return self.values.sum()


class Likelihood(LossHessian):
    """p(y | f) of one problem type; stateless. Errors are ValueErrors that name the labels or logits at fault."""

    problem_type: ClassVar[str]  # the name for `config.problem_type` and `predict(problem_type=...)`
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    fits_sequences: ClassVar[bool] = False  # `config.problem_type` of transformers' sequence classifiers may name it
    fits_other: ClassVar[bool] = False  # that of a class which transformers does not know may
    is_known: ClassVar[bool] = True  # else nothing is known but the model's own loss
    has_noise: ClassVar[bool] = False  # values with Gaussian noise, in place of class probabilities
    is_bernoulli: ClassVar[bool] = False  # every logit is a label of its own
    is_per_token: ClassVar[bool] = False  # outputs are (B, T, C)
    is_per_pixel: ClassVar[bool] = False  # logits are (B, C, H, W)
    has_many_items: ClassVar[bool] = False  # an example has several items, the unit in which the ELBO counts data
    may_be_unlabelled: ClassVar[bool] = False  # an example may have no item
    has_item_logits: ClassVar[bool] = False  # items are classes, which losses that align certainty with error take
    has_stock_loss: ClassVar[bool] = True  # transformers' heads of this kind all take the same mean of the same NLL
    is_linearizable: ClassVar[bool] = True  # a prediction has few logits, so that their covariance can be taken
    ignores_shift: ClassVar[bool] = False  # these few logits are a softmax's, which what they share does not change
    links: ClassVar[tuple[str, ...]] = ()  # from Gaussian logits to probabilities, see `linearized.links`

    # -- training ----------------------------------------------------------------------------------------------------

    def check_head(self, config: Any) -> None:
        """Raise ValueError for a model's configuration with which there is nothing to learn."""

    def item_mask(self, batch: Batch) -> Tensor:
        """Which positions of a batch are items: bool, of the items' shape; from the batch, before any forward."""
        device = next((tensor.device for tensor in tensors_in(batch)), None)
        return torch.ones(batch_size(batch), dtype=torch.bool, device=device)

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return -log p(y | f) of each item in nats, with gradient.

        Args:
            outputs: what the model returned for the batch.
            batch: what its forward took, with labels.
            noise_std: the noise s > 0 of a regression, or "head" of a model that predicts it; other heads ignore it.
        """
        raise NotImplementedError

    def mean_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean NLL as transformers' heads reduce it: over the labels that count."""
        values, mask = self.nll(outputs, batch)
        return values.sum() / mask.sum().clamp_min(1)

    def other_means(self, outputs: Any, batch: Batch) -> Iterator[Tensor]:
        """What some heads take instead, which is no other likelihood."""
        return iter(())

    def labelled_logits(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Softmax logits (..., C) of the items with the classes (...) that they predict, -100 where there is none."""
        raise NotImplementedError

    # -- prediction --------------------------------------------------------------------------------------------------

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return one draw's log-probabilities, class axis last, or a regression's values, in float32 or wider.

        Args:
            output: what the model returned under the draw.
            batch: what its forward took, of which the attention mask may matter.
            is_stacked: whether the logits are those of several draws at once, (S, ...).
        """
        raise NotImplementedError

    def log_normalizers(self, output: Any, log_probs: Tensor) -> Tensor | None:
        """Return logsumexp_c f_c of one draw's softmax logits, which normalising takes away; None of other heads.

        Args:
            output: what the model returned under the draw.
            log_probs: its `values`, (B, ..., C).

        Returns:
            (B, ...): a C-th of the memory of the logits, which are ``log_probs`` plus it.
        """
        return None

    def attended(self, values: Tensor, batch: Any) -> Tensor | None:
        """Which positions of (B, T, C) belong to the sequence, (B, T) bool; None where every value counts."""
        return None

    def aligned(self, labels: Tensor) -> Tensor:
        """Labels at the positions that predict them."""
        return labels

    def unaligned(self, classes: Tensor) -> Tensor:
        """The inverse: decisions where labels would stand, -100 where there is none."""
        return classes

    def class_numbers(self, labels: Tensor) -> Tensor:
        """Labels as int64, at the positions that predict them."""
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"`labels` must be integer classes (of a multi-label head, 0 or 1), got {labels.dtype}.")
        return self.aligned(labels.long())

    def outside(self, labels: Tensor, num_classes: int) -> Tensor:
        """Where a class number stands for no answer, of positions; elsewhere that is an error."""
        return torch.zeros_like(labels, dtype=torch.bool)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def predictions(self, log_probs: Tensor) -> Any:
        """Averaged log-probabilities in the shape of the head's logits."""
        return log_probs

    def per_example(self, uncertainty: Tensor) -> Tensor:
        """Uncertainties of the values as they are reported."""
        return uncertainty

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """What metrics need of the averaged prediction, of its shape (B,) or (B, T); None without labels."""
        raise NotImplementedError
