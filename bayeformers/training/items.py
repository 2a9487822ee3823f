"""The items of a batch: its labels, which of them count, and what is left for the model's forward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn

from ..likelihoods import IGNORED, ProblemType
from ..posteriors.base import without_labels

__all__ = [
    "IGNORED",
    "LABEL_NAMES",
    "as_labels",
    "attended_positions",
    "check_label_names",
    "count_items",
    "item_mask",
    "labels_of",
    "model_inputs",
    "span_end",
]

LABEL_NAMES = ("labels", "shift_labels", "start_positions", "end_positions")


def as_labels(inputs: Mapping[str, Any], label_names: Sequence[str] | None) -> Mapping[str, Any]:
    """The batch with the one label that `label_names` names under "labels", where the likelihoods look for it."""
    own = [name for name in label_names or () if name not in LABEL_NAMES and name in inputs]
    if len(own) != 1 or "labels" in inputs or "start_positions" in inputs:
        return inputs
    return {"labels" if name == own[0] else name: value for name, value in inputs.items()}


def check_label_names(label_names: Sequence[str] | None, problem_type: ProblemType) -> None:
    """Errors: ValueError for several `label_names` of a head with one likelihood."""
    own = [name for name in label_names or () if name not in LABEL_NAMES]
    if problem_type != "unknown" and len(own) > 1:
        raise ValueError(
            f"`label_names` must name one label of a {problem_type} head, got {list(own)}: the others would not be "
            "trained. Pass them on as inputs, and train them by `compute_loss_func`."
        )


def model_inputs(
    model: nn.Module, inputs: Mapping[str, Any], problem_type: ProblemType | None = None
) -> dict[str, Any]:
    """What the forward takes: the batch less its labels, so that it computes no loss; an unknown head keeps them."""
    if problem_type == "unknown":
        return dict(inputs)
    kept = without_labels(model, inputs)
    assert isinstance(kept, Mapping)  # as `inputs` is
    return dict(kept)


def labels_of(inputs: Mapping[str, Any], name: str = "labels") -> Tensor:
    """A batch's labels; ValueError if they are missing or no tensor."""
    labels = inputs.get(name)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"`{name}` must be a tensor in every training batch, got {type(labels).__name__}; "
            f"the batch has {sorted(inputs)}."
        )
    return labels


def span_end(inputs: Mapping[str, Any], side: str, length: int) -> tuple[Tensor, Tensor]:
    """An end of the answer (B,), and whether it lies on a token that is attended to."""
    positions = labels_of(inputs, f"{side}_positions")
    positions = positions.squeeze(-1) if positions.dim() > 1 else positions
    inside = (positions >= 0) & (positions < length)
    attended = attended_positions(inputs, length)
    if attended is not None:
        inside = inside & attended.gather(1, positions.clamp(0, length - 1)[:, None]).squeeze(1)
    return positions, inside


def attended_positions(inputs: Mapping[str, Any], length: int) -> Tensor | None:
    """The attention mask (B, T) as bool, if there is one for sequences of ``length``."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length else None


def item_mask(inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """Which positions of a batch are items: bool, (B,), (B, T) or (B, H, W); from the batch, before any forward."""
    if problem_type == "question_answering":
        main = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        sides = [span_end(inputs, side, main.shape[1])[1] for side in ("start", "end")]
        return sides[0] | sides[1]
    if problem_type == "causal_lm" and inputs.get("shift_labels") is not None:
        return labels_of(inputs, "shift_labels") != IGNORED
    if problem_type in ("unknown", "regression", "multi_label_classification"):
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        return torch.ones(find_batch_size(inputs), dtype=torch.bool, device=device)
    labels = labels_of(inputs)
    return (labels[:, 1:] if problem_type == "causal_lm" else labels) != IGNORED


def count_items(inputs: Mapping[str, Any], problem_type: ProblemType) -> Tensor:
    """Number of items in a batch, a 0-dimensional int64 tensor on the batch's device.

    >>> labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
    >>> count_items({"labels": labels}, "causal_lm").item()     # the first position is never predicted
    3
    """
    return item_mask(inputs, problem_type).sum()
