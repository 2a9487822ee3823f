"""Which likelihood a model's head has: the problem type that the loss, the item count and the evaluation share."""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto as auto

__all__ = ["ProblemType", "record_problem_type", "resolve_problem_type", "sequence_problem_type", "unwrapped"]

ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "causal_lm",
    "seq2seq_lm",
    "question_answering",
    "unknown",
]


def _names(table: Mapping[str, Any]) -> frozenset[str]:
    """The class names of one of transformers' tables, whose values are a name or several."""
    values = table.values()
    return frozenset(name for names in values for name in (names if isinstance(names, (tuple, list)) else (names,)))


# A class in two tables is what the first says: BART is no masked language model here; XLM and Flaubert, masked and
# causal, do not shift their labels. Sets, for training looks a class up several times per step.
_TABLES: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (task, _names(table))
    for task, table in (
        ("seq2seq_lm", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq_lm", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
        ("token_classification", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("token_classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        ("causal_lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("question_answering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
        ("single_label_classification", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
        ("single_label_classification", auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES),
    )
)
_PERMUTATION_LM = "XLNetLMHeadModel"  # predicts through `target_mapping`: neither aligned nor shifted
_SEQUENCE_TYPES = ("single_label_classification", "multi_label_classification", "regression")


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside data-parallel wrappers and PEFT."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = cast(nn.Module, model.module)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _class_task(model: nn.Module) -> str | None:
    """The task of the model's class or of its nearest ancestor in transformers' auto tables."""
    names = [cls.__name__ for cls in type(model).__mro__]
    if _PERMUTATION_LM in names:
        return None
    for name in names:
        for task, table in _TABLES:
            if name in table:
                return task
    if LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss:
        return "seq2seq_lm" if getattr(model.config, "is_encoder_decoder", False) else "causal_lm"
    return None


def sequence_problem_type(num_labels: int, labels: Tensor | None) -> ProblemType:
    """transformers' own rule for a sequence head without `config.problem_type`, which it applies in the first forward.

    >>> sequence_problem_type(3, torch.tensor([0, 2]))
    'single_label_classification'
    >>> sequence_problem_type(1, None)
    'regression'
    """
    if num_labels == 1:
        return "regression"
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        return "multi_label_classification"
    return "single_label_classification"


def resolve_problem_type(model: nn.Module, labels: Tensor | None = None) -> ProblemType:
    """The problem type of ``model``'s head, from its class, `config.problem_type` and, last, the labels' dtype.

    ``labels`` matter only for a sequence head whose configuration does not say whether it is single or multi label.
    A class that transformers' auto tables do not know is "unknown" unless `config.problem_type` speaks.

    Errors: ValueError for a `config.problem_type` that transformers does not have.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    task = _class_task(model)
    declared = getattr(config, "problem_type", None)
    if task in (None, "sequence") and declared is not None:
        if declared not in _SEQUENCE_TYPES:
            raise ValueError(f"`config.problem_type` must be one of {_SEQUENCE_TYPES}, got {declared!r}.")
        task = declared
    if task == "sequence":
        return sequence_problem_type(config.num_labels, labels)  # type: ignore[union-attr]
    return next((known for known in get_args(ProblemType) if known == task), "unknown")


def record_problem_type(model: nn.Module, labels: Tensor) -> bool:
    """Write what the ``labels`` decide into `config.problem_type`, as a model's own loss does at its first labels.

    Without it a multi-label head would be read as a softmax wherever there are no labels, and be saved so.
    Returns whether the configuration was open.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is None or getattr(config, "problem_type", None) is not None or _class_task(model) != "sequence":
        return False
    config.problem_type = sequence_problem_type(config.num_labels, labels)
    return True
