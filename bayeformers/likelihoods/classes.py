r"""Heads over classes: p(y = c | f) = softmax(g(f))_c, with the identity as g; one or many items per example.

The loss Hessian of a softmax is H = diag(p) - p p^T; of a g with Jacobian J it is J^T H J, the Fisher matrix of f
(McCullagh 1980). Its square root is backpropagated from the logits, never a model's own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import IGNORED, attended_positions, labels_of, logits_of, output_field
from .base import Batch, ItemNLL, Likelihood, Scores
from .loss_hessian import Generators, uniform

__all__ = ["CausalLM", "Categorical", "Seq2SeqLM", "SingleLabel", "TokenClassification", "Unknown", "align_causal",
           "check_classes", "class_scores", "cross_entropy"]  # fmt: skip

MAX_CLASSES = 1024
"""Above it (a vocabulary) the probabilities of an evaluation are not gathered: there is no ECE and no Brier score."""

ONE_CLASS = "a softmax over one class is 1 whatever the input."


class Categorical(Likelihood):
    """One class of C. A subclass with another formula overrides `class_logits`, and needs nothing else."""

    family: ClassVar[str | None] = "classification"
    may_be_unlabelled = True
    has_item_logits = True
    links: ClassVar[tuple[str, ...]] = ("auto", "probit", "mc", "bridge", "probit_diagonal")
    remedy: ClassVar[str] = "Give the head at least 2 classes."

    def class_logits(self, logits: Tensor) -> Tensor:
        """g: (..., C) -> softmax logits of the classes, such as their log-probabilities; differentiable."""
        return logits

    def align(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and the labels that they predict, of one shape but for the class axis."""
        labels = labels_of(batch)
        is_column = labels.dim() == logits.dim() and labels.shape[-1] == 1  # which the models' own losses flatten
        return logits, labels.squeeze(-1) if is_column else labels

    def labelled_logits(self, outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """g(f), and the classes."""
        logits, labels = self.align(logits_of(outputs), batch)
        return self.class_logits(logits), labels

    def item_mask(self, batch: Batch) -> Tensor:
        """The labels other than -100."""
        return labels_of(batch) != IGNORED

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return -log softmax(g(f))[label] of each item, in nats.

        Args:
            outputs: what the model returned, with logits (B, C) or (B, T, C).
            batch: what its forward took, with labels (B,) or (B, T); those of -100 do not count.
            noise_std: ignored, as classes have no noise.
        """
        return cross_entropy(*self.labelled_logits(outputs, batch))

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return the log-probabilities, (B, C) or (B, T, C).

        Args:
            output: what the model returned, with logits of the same shape.
            batch: what its forward took, which does not matter here.
            is_stacked: whether the logits have an axis S of draws before the others.

        Raises:
            ValueError: the logits have another number of axes, or one class only.
        """
        logits = logits_of(output)
        if logits.dim() > 3 + is_stacked:
            raise ValueError(
                f"`logits` of a {self.problem_type!r} head must have shape (B, C) or (B, T, C), got "
                f"{tuple(logits.shape)}. For classes of pixels, (B, C, H, W), say "
                '`problem_type="semantic_segmentation"`.'
            )
        if logits.shape[-1] == 1:
            raise ValueError(f"`logits` have the shape {tuple(logits.shape)}: {ONE_CLASS} {self.remedy}")
        return self.class_logits(logits).log_softmax(dim=-1)

    def log_normalizers(self, output: Any, log_probs: Tensor) -> Tensor | None:
        """Return logsumexp_c f_c as the largest logit less the largest log-probability; None unless g is the identity.

        Args:
            output: what the model returned, with logits of the same shape (pixels: the class axis second).
            log_probs: its `values`.
        """
        if type(self).class_logits is not Categorical.class_logits:
            return None
        return logits_of(output).amax(1 if self.is_per_pixel else -1) - log_probs.amax(-1)

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """Log-probabilities are logits of themselves: the averaged prediction has the training likelihood's form."""
        if all(batch.get(name) is None for name in self.label_names):
            return None
        logits, labels = self.align(log_probs, batch)
        nll, mask = cross_entropy(logits, labels)
        return class_scores(nll, logits, labels), mask

    # -- Laplace -----------------------------------------------------------------------------------------------------

    def _diverged(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of an item is NaN or +inf if any is, and -inf if no class can occur."""
        extremes = values.amax(-1)
        return extremes, ~extremes.isfinite()

    def _labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """Integers (...) or (..., 1), or -100, -> int64 (...)."""
        labels = labels.squeeze(-1) if labels.shape == (*values.shape[:-1], 1) else labels
        labels = labels.to(values.device)
        return check_classes(labels, values.shape, labels != IGNORED)

    def _mask(self, labels: Tensor) -> Tensor:
        """One truth per item, (..., 1)."""
        return (labels != IGNORED)[..., None]

    def _rank(self, num_outputs: int) -> int:
        """C - 1: a softmax ignores what all logits share."""
        return num_outputs - 1

    def _columns(self, values: Tensor) -> Iterator[Tensor]:
        """J^T S_k of the softmax's Cholesky factor S."""
        logits, pulled = self._linked(values)
        return (pulled(column) for column in softmax_columns(logits))

    def _gradient(self, values: Tensor, labels: Tensor) -> Tensor:
        """J^T (p - e_y)."""
        logits, pulled = self._linked(values)
        column, mask = logits.softmax(-1), self._mask(labels)
        column.scatter_add_(-1, labels.clamp_min(0)[..., None], column.new_tensor(-1.0).expand_as(mask))
        return pulled(column.masked_fill_(~mask, 0.0))

    def _sampled(self, values: Tensor, generator: Generators) -> Tensor:
        """Of a class by the inverse of the distribution function: one uniform per item, not one number per class."""
        probs = self.class_logits(values).softmax(-1)
        numbers = uniform(probs[..., :1], generator)
        cumulative = probs.to(numbers.dtype).cumsum(-1)
        # `right`: the first class whose sum exceeds u * total < total; it has p > 0
        drawn = torch.searchsorted(cumulative, numbers * cumulative[..., -1:], right=True)
        return self._gradient(values, drawn.squeeze(-1))

    def _losses(self, values: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """One per item."""
        logits = self.class_logits(values).flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none")

    def _linked(self, values: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """g(f), and v -> J^T v."""
        if type(self).class_logits is Categorical.class_logits:
            return values, lambda column: column
        logits, pull, *_ = torch.func.vjp(self.class_logits, values)
        return logits, lambda column: pull(column)[0]


class SingleLabel(Categorical):
    """A class of every example, (B, C)."""

    problem_type = "single_label_classification"
    fits_sequences = True
    ignores_shift = True
    remedy = 'Say `problem_type="regression"`, or "multi_label_classification" for the logit of a yes.'


class PerToken(Categorical):
    """A class of every token, (B, T, C)."""

    is_per_token = True
    has_many_items = True
    is_linearizable = False
    mask_name: ClassVar[str] = "attention_mask"

    def attended(self, values: Tensor, batch: Any) -> Tensor | None:
        """Values at other positions depend on what the example was batched with."""
        mask = attended_positions(batch, values.shape[1], self.mask_name)
        return mask if mask is not None and len(mask) == len(values) else None


class TokenClassification(PerToken):
    """Of few classes, or of the vocabulary of a masked language model."""

    problem_type = "token_classification"
    fits_other = True
    ignores_shift = True
    is_linearizable = True

    def check_head(self, config: Any) -> None:
        """At least two classes: the loss of one is 0 whatever the model has learned."""
        if getattr(config, "num_labels", None) == 1:
            raise ValueError(f"`config.num_labels` of a token classifier must be at least 2, got 1: {ONE_CLASS}")


class Seq2SeqLM(PerToken):
    """The tokens of a decoder that reads its labels shifted."""

    problem_type = "seq2seq_lm"
    mask_name = "decoder_attention_mask"


class CausalLM(PerToken):
    """Position t predicts label t + 1: the only place that knows the shift."""

    problem_type = "causal_lm"
    label_names = ("labels", "shift_labels")

    def item_mask(self, batch: Batch) -> Tensor:
        """The labels after the first position, which is never predicted."""
        is_shifted = batch.get("shift_labels") is not None  # by a padding-free collator
        return (labels_of(batch, "shift_labels") if is_shifted else labels_of(batch)[:, 1:]) != IGNORED

    def align(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T - 1, V) and (B, T - 1), or whole where the labels are shifted already."""
        if batch.get("shift_labels") is not None:
            return logits, labels_of(batch, "shift_labels")
        return align_causal(logits, labels_of(batch))

    def other_means(self, outputs: Any, batch: Batch) -> Iterator[Tensor]:
        """BART's decoder and its kin take their labels shifted: another alignment is no other term."""
        if output_field(outputs, "logits").shape[:2] == batch["labels"].shape:
            yield TokenClassification().mean_loss(outputs, batch)

    def aligned(self, labels: Tensor) -> Tensor:
        """(B, T), whose last position predicts nothing."""
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)

    def unaligned(self, classes: Tensor) -> Tensor:
        """The decision of a position is about the token that follows."""
        return torch.cat([torch.full_like(classes[:, :1], IGNORED), classes[:, :-1]], dim=1)

    def scores(self, log_probs: Tensor, batch: Batch) -> Scores | None:
        """At every position: the last one, and virtual tokens in front, predict no label."""
        found = super().scores(log_probs, batch)
        if found is None:
            return None
        scores, mask = found
        last = int(batch.get("shift_labels") is None)
        around = (log_probs.shape[1] - mask.shape[1] - last, last)
        labels = self.align(log_probs, batch)[1]
        return class_scores(F.pad(scores["nll"], around), log_probs, F.pad(labels, around)), F.pad(mask, around)


class Unknown(SingleLabel):
    """A head of no known kind: it trains by its own `loss`, and is read as a softmax where a prediction asks for it."""

    problem_type = "unknown"
    fits_sequences = False
    is_known = False
    may_be_unlabelled = False
    has_stock_loss = False
    ignores_shift = False
    item_mask = Likelihood.item_mask  # every example

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return the model's own `loss`, taken as a mean over examples, for each of them.

        Args:
            outputs: what the model returned, with a `loss`.
            batch: what its forward took.
            noise_std: ignored, as the model's own loss says all.

        Raises:
            ValueError: the model returned no `loss`.
        """
        loss = output_field(outputs, "loss")
        if loss is None:
            raise ValueError(
                "The likelihood of this model class is unknown and its output has no `loss`. Return a loss that is a "
                "mean over examples, set `config.problem_type`, or pass `compute_loss_func`."
            )
        mask = self.item_mask(batch)
        return ItemNLL(loss.mean().expand(mask.shape), mask)


# --------------------------------------------------------------------------------------------------------- functions


def align_causal(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, V) and (B, T) -> the aligned (B, T - 1, V) and (B, T - 1): position t predicts label t + 1."""
    # virtual tokens in front (prompt tuning) make the logits longer than the labels; they predict nothing
    return logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]


def check_classes(labels: Tensor, shape: torch.Size, mask: Tensor, name: str = "labels") -> Tensor:
    """Check that labels (...) are classes of logits (..., C).

    Args:
        labels: (...).
        shape: of the logits.
        mask: where they count; a label elsewhere may be anything.
        name: of the labels, for the message.

    Returns:
        The labels as int64.

    Raises:
        ValueError: another shape, no integers, or a class that there is not.
    """
    if labels.shape != shape[:-1]:
        raise ValueError(f"`{name}` must have shape {tuple(shape[:-1])} for these logits, got {tuple(labels.shape)}.")
    if labels.is_floating_point():
        raise ValueError(f"`{name}` must be integer classes for this head, got {labels.dtype}.")
    wrong = mask & ((labels < 0) | (labels >= shape[-1]))
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` must lie in [0, {shape[-1]}) or be {IGNORED} (ignored), got {int(labels[wrong][0])}. "
            "The head has as many classes as `config.num_labels` (or the vocabulary size)."
        )
    return labels.long()


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor | None = None, name: str = "labels") -> ItemNLL:
    """Return -log softmax(logits)[label] of each item, in nats.

    Args:
        logits: the logits f, (..., C).
        labels: integer classes, (...).
        mask: which items count, bool (...); by default those whose label is not -100.
        name: what an error calls the labels.
    """
    mask = labels != IGNORED if mask is None else mask
    target = check_classes(labels, logits.shape, mask, name).masked_fill(~mask, IGNORED)
    values = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none")
    return ItemNLL(values.view(labels.shape), mask)


def class_scores(nll: Tensor, log_probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the columns of a classification; "probs" and "labels" of few classes, for ECE and Brier score.

    Args:
        nll: the negative log-likelihood of each item in nats, (...).
        log_probs: the averaged log-probabilities, (..., C).
        labels: integer classes, (...).
    """
    few = {"probs": log_probs.exp(), "labels": labels} if log_probs.shape[-1] <= MAX_CLASSES else {}
    return {"nll": nll, **few}


def softmax_columns(logits: Tensor) -> Iterator[Tensor]:
    """The Cholesky factor of diag(p) - p p^T in closed form, C - 1 columns of the logits' shape."""
    # With the tail sums q_k = p_k + ... + p_C,
    #     S_k = sqrt(p_k q_{k+1} / q_k) (e_k - r_k),    r_k = p restricted to the classes after k, divided by q_{k+1}
    # (Tanabe and Sagae 1992, J. R. Statist. Soc. B 54(1), 211-219). Computed from log-probabilities: nothing divides by
    # a tail that has underflowed, and sqrt(p (1 - p)) keeps its relative precision where 1 - p would round to 0.
    # finite, so that differences of two impossible classes are no inf - inf; exp of a quarter of the minimum is still 0
    log_p = logits.log_softmax(-1).clamp_min(torch.finfo(logits.dtype).min / 4)
    log_tail = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    for k in range(logits.shape[-1] - 1):
        scale = (0.5 * (log_p[..., k] + log_tail[..., k + 1] - log_tail[..., k])).exp()
        column = torch.zeros_like(logits)
        column[..., k] = scale
        column[..., k + 1 :] = -scale[..., None] * (log_p[..., k + 1 :] - log_tail[..., k + 1, None]).exp()
        yield column
