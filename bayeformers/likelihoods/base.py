"""`Likelihood`: what a head's outputs f say about its labels, p(y | f). One class per problem type.

Training (each item's NLL, which items count), evaluation (what is reported of a batch), Laplace (the Hessian of
-log p in f) and predictions ask this object and compare no names. A new kind of head is one subclass in one file, and
its row in `registry`; one over classes inherits all but its formula from `classes.Categorical`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..forward import batch_size, tensors_in
from .outputs import IGNORED

__all__ = ["Batch", "Generators", "ItemNLL", "Likelihood", "Scores", "made", "uniform"]

Batch = Mapping[str, Any]
Generators = torch.Generator | Sequence[torch.Generator]
Scores = tuple[dict[str, Tensor], Tensor]
"""By name, per item: "nll", and of few classes "probs" and "labels"; and the mask of the items that count."""


class ItemNLL(NamedTuple):
    """``values`` in nats, 0 where ``mask`` is False; both of the items' shape: (B,), (B, T) or (B, H, W)."""

    values: Tensor
    mask: Tensor

    def sum(self) -> Tensor:
        """The scalar sum over the items, with gradient."""
        return self.values.sum()


class Likelihood:
    """p(y | f) of one problem type; stateless.

    Attributes:
        problem_type: its name, as `config.problem_type` and `predict(problem_type=...)` say it.
        family: its name for `laplace.fit(likelihood=...)`, shared by heads of one formula; None: no Laplace posterior.
        label_names: the batch's labels.
        fits_sequences: whether `config.problem_type` of a sequence classifier may name it.
        fits_other: whether that of a class which transformers does not know may.
        is_known: False for a head of which nothing is known but its own loss.
        has_noise: values with Gaussian noise, in place of class probabilities.
        is_per_token: whether outputs are (B, T, C).
        is_per_pixel: whether logits are (B, C, H, W).
        has_many_items: whether an example has several items, the unit in which the ELBO counts data.
        may_be_unlabelled: whether an example may have no item.
        has_stock_loss: whether transformers' heads of this kind all take the same mean of the same NLL as their loss.
        has_float_labels: whether that loss is computed with labels of another dtype than the logits.
        has_item_logits: whether items are classes with logits of their own, for losses that align certainty with error.
        is_bernoulli: whether every logit is a label of its own.
        is_linearizable: whether a prediction has few logits, so that their covariance can be taken.
        ignores_shift: whether these few logits are a softmax's, which noise that they all share does not change.
        links: from Gaussian logits to probabilities, see `linearized.links`; () where there are no such logits.
        min_outputs: C of the fewest logits.
    """

    problem_type: ClassVar[str]
    family: ClassVar[str | None] = None
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    fits_sequences: ClassVar[bool] = False
    fits_other: ClassVar[bool] = False
    is_known: ClassVar[bool] = True
    has_noise: ClassVar[bool] = False
    is_per_token: ClassVar[bool] = False
    is_per_pixel: ClassVar[bool] = False
    has_many_items: ClassVar[bool] = False
    may_be_unlabelled: ClassVar[bool] = False
    has_stock_loss: ClassVar[bool] = True
    has_float_labels: ClassVar[bool] = False
    has_item_logits: ClassVar[bool] = False
    is_bernoulli: ClassVar[bool] = False
    is_linearizable: ClassVar[bool] = True
    ignores_shift: ClassVar[bool] = False
    links: ClassVar[tuple[str, ...]] = ()
    min_outputs: ClassVar[int] = 1

    # -- training ----------------------------------------------------------------------------------------------------

    def check_head(self, config: Any) -> None:
        """Raise ValueError for a model's configuration with which there is nothing to learn."""

    def item_mask(self, batch: Batch) -> Tensor:
        """Which positions of a batch are items: bool, of the items' shape; from the batch, before any forward."""
        device = next((tensor.device for tensor in tensors_in(batch)), None)
        return torch.ones(batch_size(batch), dtype=torch.bool, device=device)

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """-log p(y | f) of each item, with gradient.

        Args:
            outputs: the model's output.
            batch: with its labels.
            noise_std: a regression's; others have none.

        Raises:
            ValueError: labels that are missing or do not fit.
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
        """Log-probabilities of one draw, class axis last, or a regression's values, in float32 or wider.

        Args:
            output: the model's output, or its logits.
            batch: the inputs, whose attention mask may matter.
            is_stacked: whether ``output`` holds several draws, (S, ...).

        Raises:
            ValueError: ``output`` has no logits of that kind.
        """
        raise NotImplementedError

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
        """Labels as int64, at the positions that predict them.

        Raises:
            ValueError: they are no whole numbers.
        """
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
        """What metrics need of the averaged prediction, of its shape (B,) or (B, T); None without labels.

        Raises:
            ValueError: labels that do not fit.
        """
        raise NotImplementedError

    # -- Laplace: values are logits (..., C) in float32 or wider, without gradient, aligned with the labels -----------

    def diverged(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(numbers, where they are wrong): what says that logits are not finite."""
        return values, ~values.isfinite()

    def check_labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """Labels on the device of ``values``, in the shape and dtype in which the methods below take them.

        Raises:
            ValueError: another shape, dtype or range.
        """
        raise NotImplementedError

    def label_mask(self, labels: Tensor) -> Tensor:
        """True where a logit enters the likelihood of these labels: (..., C), or (..., 1) for all of an item."""
        return labels != IGNORED

    def num_columns(self, num_outputs: int) -> int:
        """The rank of H, and the number of columns of its square root."""
        return num_outputs

    def loss_hessian_sqrt(self, values: Tensor) -> Iterator[Tensor]:
        """Columns S_k of the logits' shape with sum_k S_k S_k^T = H, the expected Hessian of -log p(y | f) in f."""
        raise NotImplementedError

    def gradient(self, values: Tensor, labels: Tensor) -> Tensor:
        """That of -log p(labels | f) in f; 0 where ignored."""
        raise NotImplementedError

    def sampled_gradient(self, values: Tensor, generator: Generators) -> Tensor:
        """The same for labels that the model draws, one of every item: its covariance is the Fisher matrix, H."""
        raise NotImplementedError

    def losses(self, values: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """-log p(labels | f), not summed; 0 where ignored."""
        raise NotImplementedError


def uniform(like: Tensor, generator: Generators) -> Tensor:
    """U[0, 1) of one shape and device, in float64: float32 would draw outcomes rarer than 2^-24 too often or never."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64
    return made(torch.rand, like.shape, generator, dtype).to(like.device)


def made(draw: Callable[..., Tensor], shape: torch.Size, generator: Generators, dtype: torch.dtype) -> Tensor:
    """Numbers of one generator, or of one for each of the first axis."""
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, dtype=dtype)
    return torch.stack([draw(shape[1:], generator=one, dtype=dtype) for one in generator])
