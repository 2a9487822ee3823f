"""What a model's own loss holds besides the likelihood: a mixture's balance loss, a z-loss, smoothing, class weights.

The ELBO takes its likelihood from the logits, and such terms would vanish with the model's loss. They are what the own
loss leaves when the plain mean that heads of this kind take is subtracted: loss - mean_loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..likelihoods import ProblemType, without_ignored
from ..nn.draws import posterior_mean
from .elbo import preserved_rng
from .items import labels_of
from .likelihood import item_nll, output_field

__all__ = ["OWN_TERMS", "ForwardPass", "has_own_terms", "own_terms"]

OWN_TERMS = (
    "The own loss of {} has terms besides the likelihood (a mixture's balance loss, class weights, ...): they are "
    "trained along, and logged as `own_terms`."
)

_MEANS: tuple[ProblemType, ...] = (
    "single_label_classification",
    "token_classification",
    "causal_lm",
    "seq2seq_lm",
    "multi_label_classification",
    "regression",
    "question_answering",
    "semantic_segmentation",
)
"""Problem types whose heads all take the same mean."""


class ForwardPass(NamedTuple):
    """One training forward: the items' summed NLL, what the model's own loss holds besides, and its outputs."""

    nll: Tensor
    own_terms: Tensor | float
    outputs: Any


def own_terms(outputs: Any, inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """The model's ``loss`` less the mean likelihood that it contains: a scalar with gradient.

    ``inputs``: the batch, in which the label that counts for nothing is -100.
    """
    loss = output_field(outputs, "loss")
    if loss is None:
        raise ValueError("The model's output has no `loss`, of which its own terms are a part.")
    return loss.float().mean() - _mean_loss(outputs, inputs, problem_type)


def _mean_loss(outputs: Any, inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """As transformers' heads reduce it: over the labels that count, a multi-label head's over its labels too."""
    if problem_type == "regression":
        logits = outputs["logits"].float().squeeze()
        return F.mse_loss(logits, inputs["labels"].to(logits).squeeze())
    if problem_type == "question_answering":
        return 0.5 * (_span_loss(outputs, inputs, "start") + _span_loss(outputs, inputs, "end"))
    values, mask = item_nll(outputs, inputs, problem_type)
    per_item = outputs["logits"].shape[-1] if problem_type == "multi_label_classification" else 1
    return values.sum() / (mask.sum().clamp_min(1) * per_item)


def _span_loss(outputs: Any, inputs: Mapping[str, Any], side: str) -> Tensor:
    """Of one end, as the heads take it: padding competes, and what is negative counts as the first position."""
    logits, positions = outputs[f"{side}_logits"].float(), labels_of(inputs, f"{side}_positions")
    outside = logits.shape[1]
    return F.cross_entropy(logits, positions.reshape(-1).clamp(0, outside), ignore_index=outside)


@torch.no_grad()
def has_own_terms(
    model: nn.Module, inputs: Mapping[str, Any], labelled: Mapping[str, Any], problem_type: ProblemType
) -> bool:
    """Whether the model's loss is more than its likelihood, tried on one batch at the posterior mean, in `eval()`.

    ``inputs``: the batch, its labels under "labels" or as ends of a span; ``labelled``: the same as the model takes it.
    """
    label = "start_positions" if problem_type == "question_answering" else "labels"
    if problem_type not in _MEANS or not isinstance(inputs.get(label), Tensor):
        return False
    inputs = without_ignored(inputs, model, problem_type)
    modes = {module: module.training for module in model.modules()}
    try:
        with preserved_rng(), posterior_mean(model.eval()):
            outputs = model(**labelled)
            loss = output_field(outputs, "loss")
            if not isinstance(loss, Tensor):
                return False
            terms, plain = own_terms(outputs, inputs, problem_type), _mean_loss(outputs, inputs, problem_type)
    except (KeyError, RuntimeError, TypeError, ValueError, IndexError, AttributeError, NameError):
        # a loss that does not take these labels is not what would be trained; NameError: DPT's without auxiliary head
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    is_aligned = problem_type == "causal_lm" and outputs["logits"].shape[:2] == inputs["labels"].shape
    if is_aligned and _is_close(loss, _mean_loss(outputs, inputs, "token_classification"), 1e-3):
        return False  # BART's decoder and its kin take their labels shifted: another alignment is no other term
    if problem_type == "multi_label_classification" and _is_close(loss, plain * outputs["logits"].shape[-1], 1e-3):
        return False  # ViLT's sums over the labels of an example: the likelihood itself
    # a cross-entropy has the dtype that it is computed in; a squared error of float32 labels hides that of the logits
    is_mixed = problem_type in ("multi_label_classification", "regression")
    rounding = 2e-5 if (outputs["logits"] if is_mixed else loss).dtype.itemsize > 2 else 2e-2
    return bool(terms.isfinite()) and not _is_close(loss, plain, rounding)


def _is_close(loss: Tensor, plain: Tensor, rounding: float) -> bool:
    return float((loss.float().mean() - plain).abs()) <= rounding * max(1.0, float(plain.abs()))
