"""The negative log-likelihood of every training item, by problem type; never the model's own loss.

A model's `loss` is often no log-likelihood: it is a mean over whatever the head averages (labels, positions, tokens of
this micro-batch), it halves the question-answering sum, and for regression it is a squared error without a variance.
The functions here return one number per *item*, the unit in which the ELBO counts its data:

| problem type | item | NLL of an item |
| --- | --- | --- |
| single-label | example | -log softmax(logits)[label] |
| multi-label | example | sum over labels of the Bernoulli NLL |
| regression | example | Gaussian: (y - f)^2 / (2 s^2) + log s + log(2 pi) / 2, summed over outputs |
| token classification, masked LM, seq2seq LM | label != -100 | -log softmax(logits)[label] |
| semantic segmentation | pixel with a label | the same, of logits interpolated bilinearly to the labels' resolution |
| causal LM | label != -100 after the first position | the same; position t predicts label t + 1 |
| question answering | feature | start NLL + end NLL over attended positions; one outside them adds nothing |
| unknown | example | the model's own `loss`, taken as a mean over examples |

s is one number, or what a variance head predicts of each example (`losses.gaussian_nll`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..likelihoods import HEAD, NoiseStd, ProblemType, drawn_values, resized
from ..losses import gaussian_nll, split_variance_head
from .items import IGNORED, attended_positions, item_mask, labels_of, span_end

__all__ = ["ItemNLL", "align_causal", "item_nll", "output_field", "regression_labels"]


class ItemNLL(NamedTuple):
    """``values`` in nats, 0 where ``mask`` is False; both of the items' shape: (B,) or (B, T)."""

    values: Tensor
    mask: Tensor

    def sum(self) -> Tensor:
        """The scalar sum over the items, with gradient."""
        return self.values.sum()


def output_field(outputs: Any, name: str) -> Tensor | None:
    """A field of a model's output: of a ModelOutput or dict, or, for logits, a bare tensor or the first of a tuple."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    if name == "logits" and isinstance(outputs, (Tensor, tuple)):
        return outputs if isinstance(outputs, Tensor) else outputs[0]
    return getattr(outputs, name, None)


def _logits(outputs: Any, name: str = "logits") -> Tensor:
    logits = output_field(outputs, name)
    if logits is None:
        raise ValueError(f"The model's output has no `{name}`, from which the log-likelihood is computed.")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_range(labels: Tensor, mask: Tensor, num_classes: int, name: str) -> None:
    if labels.is_floating_point():
        raise ValueError(f"`{name}` must be integer classes for this head, got {labels.dtype}.")
    wrong = mask & ((labels < 0) | (labels >= num_classes))
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` must lie in [0, {num_classes}) or be {IGNORED} (ignored), got {int(labels[wrong][0])}. "
            "The head has as many classes as `config.num_labels` (or the vocabulary size)."
        )


def _cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, name: str = "labels") -> ItemNLL:
    """``logits`` (..., C), ``labels`` and ``mask`` (...) -> values (...)."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"`{name}` must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}.")
    _check_range(labels, mask, logits.shape[-1], name)
    target = labels.masked_fill(~mask, IGNORED).long()
    values = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none")
    return ItemNLL(values.view(labels.shape), mask)


def _class_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    logits, labels = _logits(outputs), labels_of(inputs)
    if labels.dim() == logits.dim() and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)  # (B, 1), which the models' own losses flatten
    return _cross_entropy(logits, labels, labels != IGNORED)


def _multi_label_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    logits, labels = _logits(outputs), labels_of(inputs)
    if labels.shape != logits.shape:
        raise ValueError(f"`labels` must have shape {tuple(logits.shape)}, got {tuple(labels.shape)}.")
    labels = labels.to(logits)
    if not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError("`labels` of a multi-label head must lie in [0, 1]: one indicator per label.")
    values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").flatten(1).sum(1)
    return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))


def _regression_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    output = _logits(outputs)
    if noise_std == HEAD:
        labels = regression_labels(inputs, split_variance_head(output)[0])
        values = gaussian_nll(output.reshape(len(output), -1), labels, "none")
        return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))
    if noise_std is None or not (math.isfinite(noise_std) and noise_std > 0):
        raise ValueError(f"`noise_std` must be a number > 0 for a Gaussian likelihood, got {noise_std!r}.")
    residual = (regression_labels(inputs, output) - output.reshape(len(output), -1)) / noise_std
    constant = math.log(noise_std) + 0.5 * math.log(2 * math.pi)
    values = (0.5 * residual.square() + constant).sum(1)
    return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))


def regression_labels(inputs: Mapping[str, Any], mean: Tensor) -> Tensor:
    """A regression's labels (B, L) in the dtype of its ``mean`` (B,) or (B, L).

    Errors: ValueError for labels of another number, or that are not finite.
    """
    labels = labels_of(inputs).to(mean)
    if labels.numel() != mean.numel():
        raise ValueError(f"`labels` must have {mean.numel()} numbers, as the head's output, got {labels.numel()}.")
    if not bool(labels.isfinite().all()):
        raise ValueError("`labels` of a regression must be finite.")
    return labels.reshape(len(mean), -1)


def align_causal(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and labels (B, T) -> the aligned (B, T - 1, V) and (B, T - 1): position t predicts label t + 1.

    Virtual tokens in front (prompt tuning) make the logits longer than the labels; they predict nothing.
    """
    return logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]


def _token_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    labels = labels_of(inputs)
    return _cross_entropy(_logits(outputs), labels, labels != IGNORED)


def _pixel_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    log_probs, labels = drawn_values(outputs, "semantic_segmentation", inputs), labels_of(inputs)
    if labels.dim() != 3 or len(labels) != len(log_probs):
        raise ValueError(
            f"`labels` must have shape ({len(log_probs)}, H, W), a class per pixel, got {tuple(labels.shape)}."
        )
    return _cross_entropy(resized(log_probs, (labels.shape[1], labels.shape[2])), labels, labels != IGNORED)


def _causal_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    logits = _logits(outputs)
    if inputs.get("shift_labels") is not None:  # a padding-free collator has shifted them
        labels = labels_of(inputs, "shift_labels")
    else:
        logits, labels = align_causal(logits, labels_of(inputs))
    return _cross_entropy(logits, labels, labels != IGNORED)


def _question_nll(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    parts = []
    for side in ("start", "end"):
        logits = _logits(outputs, f"{side}_logits")
        attended = attended_positions(inputs, logits.shape[1])
        if attended is not None:  # else an example's NLL would depend on the padding, that is, on its batch
            logits = logits.masked_fill(~attended, -torch.inf)
        positions, mask = span_end(inputs, side, logits.shape[1])
        parts.append(_cross_entropy(logits, positions, mask, f"{side}_positions"))
    start, end = parts
    return ItemNLL(start.values + end.values, start.mask | end.mask)


def _own_loss(outputs: Any, inputs: Mapping[str, Any], noise_std: NoiseStd | None) -> ItemNLL:
    loss = output_field(outputs, "loss")
    if loss is None:
        raise ValueError(
            "The likelihood of this model class is unknown and its output has no `loss`. Return a loss that is a mean "
            "over examples, set `config.problem_type`, or pass `compute_loss_func`."
        )
    mask = item_mask(inputs, "unknown")
    return ItemNLL(loss.mean().expand(mask.shape), mask)


_NLL: dict[ProblemType, Callable[[Any, Mapping[str, Any], NoiseStd | None], ItemNLL]] = {
    "single_label_classification": _class_nll,
    "multi_label_classification": _multi_label_nll,
    "regression": _regression_nll,
    "token_classification": _token_nll,
    "seq2seq_lm": _token_nll,
    "causal_lm": _causal_nll,
    "question_answering": _question_nll,
    "semantic_segmentation": _pixel_nll,
    "unknown": _own_loss,
}


def item_nll(
    outputs: Any, inputs: Mapping[str, Any], problem_type: ProblemType, noise_std: NoiseStd | None = None
) -> ItemNLL:
    """-log p(y | x, w) of each item of a batch, in nats, float32 or better, with gradient.

    ``outputs``: the model's output (ModelOutput, dict, tuple or logits); ``inputs``: the batch, labels included;
    ``noise_std``: the Gaussian likelihood's standard deviation, in the labels' unit, or "head" for outputs that are L
    means and then L log variances; regression only.

    Errors: ValueError for missing, misshapen or out-of-range labels, naming them.

    >>> logits, labels = torch.zeros(2, 4), torch.tensor([1, 3])
    >>> item_nll(logits, {"labels": labels}, "single_label_classification").values
    tensor([1.3863, 1.3863])
    """
    return _NLL[problem_type](outputs, inputs, noise_std)
