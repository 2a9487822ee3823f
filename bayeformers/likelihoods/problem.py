"""Which likelihood a model's head has: the problem type that the loss, the item count and the evaluation share."""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto as auto

__all__ = [
    "PROBLEM_TYPES",
    "ProblemType",
    "check_problem_type",
    "is_encoder_decoder_lm",
    "record_problem_type",
    "resolve_problem_type",
    "sequence_problem_type",
    "unwrapped",
]

ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "causal_lm",
    "seq2seq_lm",
    "question_answering",
    "semantic_segmentation",
    "unknown",
]

PROBLEM_TYPES: tuple[ProblemType, ...] = tuple(known for known in get_args(ProblemType) if known != "unknown")
"""Those that a head can be told to have."""


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
        ("token_classification", auto.MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES),
        ("causal_lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("question_answering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        ("question_answering", auto.MODEL_FOR_DOCUMENT_QUESTION_ANSWERING_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        ("sequence", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES),
        ("single_label_classification", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
        ("single_label_classification", auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES),
        # of an image, which of the given texts
        ("zero_shot", auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("semantic_segmentation", auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES),
        ("multi_label_classification", {"vilt": "ViltForQuestionAnswering"}),  # a score of every answer
    )
)
_BODIES = (
    _names(auto.MODEL_MAPPING_NAMES)
    | _names(auto.MODEL_FOR_BACKBONE_MAPPING_NAMES)
    | _names(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
)
_PERMUTATION_LM = "XLNetLMHeadModel"  # predicts through `target_mapping`: neither aligned nor shifted
_SEQUENCE_TYPES = ("single_label_classification", "multi_label_classification", "regression")
_DECLARED_TYPES = (*_SEQUENCE_TYPES, "token_classification", "semantic_segmentation")  # of a head that is not known


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside data-parallel and compiled wrappers and PEFT."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _wrapped(model: nn.Module) -> nn.Module | None:
    found = (getattr(model, name, None) for name in ("module", "_orig_mod"))
    return next((inner for inner in found if isinstance(inner, nn.Module)), None)


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


def check_problem_type(problem_type: Any) -> ProblemType:
    """What a caller says that a head predicts.

    Errors: ValueError for what is not one of `PROBLEM_TYPES`.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES}, got {problem_type!r}.")
    return cast(ProblemType, problem_type)


def is_encoder_decoder_lm(model: nn.Module) -> bool:
    """Whether the model's class is that of a language model with an encoder, whose decoder reads the labels."""
    model = unwrapped(model)
    return _class_task(model) == "seq2seq_lm"


def _unsupported_head(model: nn.Module) -> str | None:
    """The name of transformers' own class, or of the one with a head that a user's class extends.

    A user's class around a transformers body has a head of its own.
    """
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return None
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models."):
            is_own_head = cls is type(model) or cls.__name__ not in _BODIES
            return cls.__name__ if is_own_head and not cls.__name__.endswith("PreTrainedModel") else None
    return None


def resolve_problem_type(model: nn.Module, labels: Any = None, *, or_unknown: bool = False) -> ProblemType:
    """The problem type of ``model``'s head, from its class, `config.problem_type` and, last, the labels' dtype.

    ``labels`` matter only for a sequence head whose configuration does not say whether it is single or multi label.
    A class that is not transformers' own is "unknown" unless `config.problem_type` speaks; so is, with ``or_unknown``,
    one of transformers' whose outputs are of no kind that is known here, such as boxes or contrasts.

    Errors: ValueError for such a class, and for a `config.problem_type` that there is not.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    task = _class_task(model)
    declared = getattr(config, "problem_type", None)
    if task in (None, "sequence") and declared is not None:
        allowed = _SEQUENCE_TYPES if task == "sequence" else _DECLARED_TYPES
        if declared not in allowed:
            raise ValueError(f"`config.problem_type` must be one of {allowed}, got {declared!r}.")
        task = declared
    if task == "sequence":
        given = labels if isinstance(labels, Tensor) else None
        return sequence_problem_type(config.num_labels, given)  # type: ignore[union-attr]
    if task == "zero_shot" and not (or_unknown and labels is None):  # without labels such a model trains by contrasts
        return "single_label_classification"
    if task is None and not or_unknown and (name := _unsupported_head(model)) is not None:
        raise ValueError(
            f"`problem_type` of {name} is not known: its outputs are of none of the kinds {PROBLEM_TYPES}. If they "
            f"are, say so: `predict(..., problem_type=...)`, or `config.problem_type`, one of {_DECLARED_TYPES}; "
            "a training on another objective takes `compute_loss_func`."
        )
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
