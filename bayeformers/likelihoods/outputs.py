"""One model output under one draw -> log-probabilities with the class axis last (or a regression's values)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import Inputs
from .gaussian import wide
from .noise import HEAD, NoiseStd, mean_and_variance, squeezed
from .problem import ProblemType

TOKEN_PROBLEMS: tuple[ProblemType, ...] = ("token_classification", "causal_lm", "seq2seq_lm")


ONE_CLASS = "a softmax over one class is 1 whatever the input."
_OTHER_PROBLEMS = ' Say `problem_type="regression"`, or "multi_label_classification" for the logit of a yes.'


def drawn_values(output: Any, problem_type: ProblemType, inputs: Inputs, *, is_stacked: bool = False) -> Tensor:
    """Log-probabilities (or, for a regression, values) of one draw, in float32 or the wider dtype of the logits.

    | problem type | shape |
    | --- | --- |
    | single-label classification, "unknown" | (B, C) |
    | multi-label classification | (B, L, 2): a Bernoulli per label, absent and present |
    | regression | (B,), or (B, L) with several outputs (a variance head: `noise.mean_and_variance` splits them) |
    | token classification, language models | (B, T, C) |
    | semantic segmentation | (B, H, W, C) of logits (B, C, H, W), at their resolution |
    | question answering | (B, 2, T): start and end, over the positions that ``attention_mask`` admits |

    ``is_stacked``: of several draws at once, (S, ...) -> (S, ...).

    Raises:
        ValueError: ``output`` has no logits of that kind.

    >>> drawn_values(torch.zeros(1, 2), "single_label_classification", {}).exp()
    tensor([[0.5000, 0.5000]])
    """
    if problem_type == "question_answering":
        return _span_log_probs(output, inputs)
    logits = logits_of(output)
    if problem_type == "regression":
        return squeezed(logits)
    if problem_type == "multi_label_classification":
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)
    if problem_type == "semantic_segmentation":
        return _pixels_first(logits).log_softmax(dim=-1)
    if logits.dim() > 3 + is_stacked:
        raise ValueError(
            f"`logits` of a {problem_type!r} head must have shape (B, C) or (B, T, C), got {tuple(logits.shape)}. For "
            'classes of pixels, (B, C, H, W), say `problem_type="semantic_segmentation"`.'
        )
    if problem_type in ("single_label_classification", "unknown", "token_classification") and logits.shape[-1] == 1:
        raise ValueError(
            f"`logits` have the shape {tuple(logits.shape)}: {ONE_CLASS}"
            + (" Give the head at least 2 classes." if problem_type == "token_classification" else _OTHER_PROBLEMS)
        )
    return logits.log_softmax(dim=-1)


def _pixels_first(logits: Tensor) -> Tensor:
    if logits.dim() != 4 or logits.shape[1] < 2:
        raise ValueError(
            f"`logits` of a segmentation must have shape (B, C, H, W) with C >= 2 classes, got {tuple(logits.shape)}."
        )
    return logits.movedim(1, -1)


def regression_values(output: Any, noise_std: NoiseStd | None) -> tuple[Tensor, Tensor]:
    """Means and noise variances of one draw of a regression, (B,) or (B, L) each, in float32 or wider.

    Raises:
        ValueError: ``output`` has no values, the noise is not known, or a variance head has an odd number of them.

    >>> regression_values(torch.tensor([[1.5, 0.0]]), "head")
    (tensor([1.5000]), tensor([1.]))
    """
    values = logits_of(output)
    if noise_std is None:
        raise ValueError("`noise_std` is not known: give a number > 0, for example the RMSE on training data.")
    if noise_std == HEAD:
        return mean_and_variance(values)
    values = squeezed(values)
    return values, torch.full_like(values, noise_std**2)


def token_mask(values: Tensor, problem_type: ProblemType, inputs: Inputs) -> Tensor | None:
    """Which positions of (B, T, C) belong to the sequence, (B, T) bool; None where every value counts.

    Values at other positions depend on what the example was batched with.
    """
    if problem_type not in TOKEN_PROBLEMS or not isinstance(inputs, Mapping):
        return None
    mask = inputs.get("decoder_attention_mask" if problem_type == "seq2seq_lm" else "attention_mask")
    fits = isinstance(mask, Tensor) and mask.shape == values.shape[:2]
    return mask.bool() if fits and mask is not None else None


def _span_log_probs(output: Any, inputs: Inputs) -> Tensor:
    start, end = _field(output, "start_logits", 0), _field(output, "end_logits", 1)
    if start is None or end is None:
        raise ValueError(f"`output` needs `start_logits` and `end_logits`, got {_description(output)}.")
    logits = wide(torch.stack([start, end], dim=1))
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == start.shape:
        # Else the distribution would depend on the padding, that is, on the rest of the batch.
        logits = logits.masked_fill(mask[:, None] == 0, -torch.inf)
    return logits.log_softmax(dim=-1)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, in float32 or wider.

    Raises:
        ValueError: it has none.
    """
    logits = _field(output, "logits", 0)
    if logits is None:
        logits = _field(output, "logits_per_image", None)  # zero-shot classification of images by texts
    if logits is None or logits.dim() < 1:
        raise ValueError(f"`output` needs `logits`, got {_description(output)}.")
    return wide(logits)


def _field(output: Any, name: str, position: int | None) -> Tensor | None:
    value: Any = None
    if isinstance(output, Mapping):
        value = output.get(name)
    elif isinstance(output, Tensor):
        value = output if position == 0 else None
    elif isinstance(output, tuple) and position is not None and len(output) > position:
        value = output[position]
    return value if isinstance(value, Tensor) else None


def _description(output: Any) -> str:
    return f"{type(output).__name__} with {list(output)}" if isinstance(output, Mapping) else type(output).__name__
