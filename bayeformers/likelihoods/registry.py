"""The likelihoods by name, and which of them a model's head has: what the loss, the counts and the evaluation share.

A new likelihood is a row of `register` below, or a call of it by its user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto import modeling_auto as auto

from ..checks import check_choice
from ..forward import IGNORED, output_field
from .base import Likelihood
from .classes import CausalLM, Seq2SeqLM, SingleLabel, TokenClassification, Unknown
from .gaussian import Regression
from .multi_label import MultiLabel
from .ordinal import OrdinalRegression
from .preference import PairwisePreference
from .question_answering import QuestionAnswering
from .segmentation import IGNORED_PIXEL, SemanticSegmentation

__all__ = [
    "PROBLEM_TYPES", "ProblemType", "check_problem_type", "drawn_values", "families", "get_likelihood", "ignored_label",
    "infer_problem_type", "is_encoder_decoder_lm", "likelihood_of_family", "likelihoods", "record_problem_type",
    "register", "resolve_problem_type", "sequence_problem_type", "token_mask", "unwrapped", "without_ignored",
]  # fmt: skip

ProblemType = str
"""The name of a likelihood: "single_label_classification", "regression", ..., or "unknown"."""

_BY_NAME: dict[str, Likelihood] = {}
_BY_FAMILY: dict[str, Likelihood] = {}  # the first of a family stands for it


_NEEDED = ("problem_type", "nll")


def register(likelihood: Likelihood) -> None:
    """Let `config.problem_type`, `predict(problem_type=...)` and, with a family, `laplace.fit(likelihood=...)` name it.

    Raises:
        TypeError: no `Likelihood`, or one that lacks its name or its NLL.
        ValueError: its name is another class's.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"`likelihood` must be an instance of a Likelihood, got {likelihood!r}.")
    kind = type(likelihood)
    lacking = [name for name in _NEEDED if getattr(kind, name, None) is getattr(Likelihood, name, None)]
    if lacking:
        raise TypeError(f"`likelihood` {kind.__name__} must define {lacking}: its own name, and what it is.")
    known = _BY_NAME.get(likelihood.problem_type)
    is_redefined = (
        type(known) is not kind and type(known).__qualname__ == kind.__qualname__
    )  # a notebook's cell ran again
    if known is not None and not is_redefined:
        raise ValueError(f"`likelihood` {likelihood.problem_type!r} is registered already, as {known!r}.")
    _BY_NAME[likelihood.problem_type] = likelihood
    if likelihood.family is not None:
        _BY_FAMILY.setdefault(likelihood.family, likelihood)


for _likelihood in (
    SingleLabel(),
    MultiLabel(),
    Regression(),
    OrdinalRegression(),
    TokenClassification(),
    CausalLM(),
    Seq2SeqLM(),
    QuestionAnswering(),
    SemanticSegmentation(),
    PairwisePreference(),
    Unknown(),
):
    register(_likelihood)


def get_likelihood(problem_type: ProblemType) -> Likelihood:
    """Look up the likelihood of a problem type.

    Returns:
        The one object of that name.

    Raises:
        ValueError: there is none of that name.

    >>> get_likelihood("causal_lm").has_many_items
    True
    """
    if problem_type not in _BY_NAME:
        raise ValueError(f"`problem_type` must be one of {tuple(_BY_NAME)}, got {problem_type!r}.")
    return _BY_NAME[problem_type]


def likelihoods() -> tuple[Likelihood, ...]:
    """All that a head can be told to have."""
    return tuple(likelihood for likelihood in _BY_NAME.values() if likelihood.is_known)


PROBLEM_TYPES: tuple[ProblemType, ...] = tuple(likelihood.problem_type for likelihood in likelihoods())
"""Those that a head can be told to have, of the package's own."""


def families() -> tuple[str, ...]:
    """What `laplace.fit(likelihood=...)` takes: "classification", "multilabel", "regression", "ordinal", ..."""
    return tuple(_BY_FAMILY)


def likelihood_of_family(family: str) -> Likelihood:
    """The likelihood that stands for a family, whose heads share the formula; ValueError for another name."""
    check_choice("likelihood", family, tuple(_BY_FAMILY))
    return _BY_FAMILY[family]


def drawn_values(output: Any, problem_type: ProblemType, inputs: Any) -> Tensor:
    """Read one draw of a model's output.

    (B, C) of one class per example, (B, T, C) of tokens, (B, L, 2) of labels (absent and present), (B, H, W, C) of
    pixels at the logits' resolution, (B, 2, T) of the start and end of an answer, (B,) or (B, L) of a regression.

    Args:
        output: the model's output, or its logits.
        problem_type: what the head predicts.
        inputs: the batch, whose attention mask says which positions of an answer there are.

    Returns:
        Log-probabilities, or a regression's values, in float32 or the wider dtype of the logits.

    >>> import torch
    >>> drawn_values(torch.zeros(1, 2), "single_label_classification", {}).exp()
    tensor([[0.5000, 0.5000]])
    """
    return get_likelihood(problem_type).values(output, inputs)


def token_mask(values: Tensor, problem_type: ProblemType, inputs: Any) -> Tensor | None:
    """Return which positions belong to the sequence, (B, T) bool; None where every value counts.

    Args:
        values: one draw's log-probabilities, (B, T, C) of a head per token.
        problem_type: what the head predicts.
        inputs: what the model's forward took, with its attention mask.
    """
    return get_likelihood(problem_type).attended(values, inputs)


def check_problem_type(problem_type: Any) -> ProblemType:
    """What a caller says that a head predicts; ValueError if there is no such problem type."""
    known = tuple(likelihood.problem_type for likelihood in likelihoods())
    check_choice("problem_type", problem_type, known)
    return str(problem_type)


# ------------------------------------------------------------------------------------------------- of a model


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
    """Apply transformers' own rule for a sequence head without `config.problem_type`, as its first forward does.

    Returns:
        The problem type.

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


def is_encoder_decoder_lm(model: nn.Module) -> bool:
    """Whether the model's class is that of a language model with an encoder, whose decoder reads the labels."""
    model = unwrapped(model)
    return _class_task(model) == "seq2seq_lm"


def _unsupported_head(model: nn.Module) -> str | None:
    """The name of transformers' own class, or of the one with a head that a user's class extends."""
    # a user's class around a transformers body has a head of its own
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return None
    for cls in type(model).__mro__:
        if cls.__module__.startswith("transformers.models."):
            is_own_head = cls is type(model) or cls.__name__ not in _BODIES
            return cls.__name__ if is_own_head and not cls.__name__.endswith("PreTrainedModel") else None
    return None


def resolve_problem_type(model: nn.Module, labels: Any = None, *, or_unknown: bool = False) -> ProblemType:
    """The problem type of ``model``'s head, from its class, `config.problem_type` and, last, the labels' dtype.

    A class that is not transformers' own is "unknown" unless `config.problem_type` speaks.

    Args:
        model: any module.
        labels: of a batch; they matter only for a sequence head whose configuration does not say whether it is single
            or multi label.
        or_unknown: whether one of transformers' classes whose outputs are of no kind that is known here, such as boxes
            or contrasts, is "unknown" too.

    Returns:
        The problem type.

    Raises:
        ValueError: such a class, and a `config.problem_type` that there is not.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    task = _class_task(model)
    declared = getattr(config, "problem_type", None)
    if task in (None, "sequence") and declared is not None:
        known = _BY_NAME.get(declared)
        if known is None or not (known.fits_sequences or (known.fits_other and task is None)):
            allowed = _declarable(of_sequences=task is not None)
            raise ValueError(f"`config.problem_type` must be one of {allowed}, got {declared!r}.")
        return known.problem_type
    if task == "sequence":
        given = labels if isinstance(labels, Tensor) else None
        return sequence_problem_type(config.num_labels, given)  # type: ignore[union-attr]
    if task == "zero_shot":  # without labels such a model trains by contrasts
        return "unknown" if or_unknown and labels is None else "single_label_classification"
    if task is None and not or_unknown and (name := _unsupported_head(model)) is not None:
        raise ValueError(
            f"`problem_type` of {name} is not known: its outputs are of none of the kinds {PROBLEM_TYPES}. If they "
            f"are, say so: `predict(..., problem_type=...)`, or `config.problem_type`, one of {_declarable()}; "
            "a training on another objective takes `compute_loss_func`."
        )
    return "unknown" if task is None else task


def _declarable(*, of_sequences: bool = False) -> tuple[ProblemType, ...]:
    known = (known for known in likelihoods() if known.fits_sequences or (known.fits_other and not of_sequences))
    return tuple(likelihood.problem_type for likelihood in known)


def record_problem_type(model: nn.Module, labels: Tensor) -> bool:
    """Write what the ``labels`` decide into `config.problem_type`, as a model's own loss does at its first labels.

    Without it a multi-label head would be read as a softmax wherever there are no labels, and be saved so.

    Returns:
        Whether the configuration was open.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if config is None or getattr(config, "problem_type", None) is not None or _class_task(model) != "sequence":
        return False
    config.problem_type = sequence_problem_type(config.num_labels, labels)
    return True


def infer_problem_type(output: Any, labels: Any) -> ProblemType:
    """Guess the problem of a class that transformers does not know, from logits and integer labels.

    Returns:
        A classification, or "unknown".

    >>> infer_problem_type({"logits": torch.zeros(4, 3)}, torch.zeros(4, dtype=torch.long))
    'single_label_classification'
    """
    logits = output_field(output, "logits") if isinstance(output, (Tensor, Mapping)) else None
    if logits is None or not isinstance(labels, Tensor) or labels.is_floating_point() or logits.dim() < 2:
        return "unknown"
    if logits.dim() == 4 and labels.dim() == 3 and logits.shape[1] > 1:
        return "semantic_segmentation"
    if logits.shape[-1] < 2:
        return "unknown"
    if logits.dim() == 2 and labels.dim() == 1:
        return "single_label_classification"
    is_tokens = logits.dim() == 3 and logits.shape[:2] == labels.shape
    return "token_classification" if is_tokens else "unknown"


def ignored_label(model: nn.Module, problem_type: ProblemType) -> int:
    """The label that the model's own loss ignores: -100, and 255 of pixels unless the configuration says another."""
    if not get_likelihood(problem_type).is_per_pixel:
        return IGNORED
    config = getattr(unwrapped(model), "config", None)
    found = (getattr(config, name, None) for name in ("semantic_loss_ignore_index", "loss_ignore_index"))
    return next((int(value) for value in found if value is not None), IGNORED_PIXEL)


def without_ignored(batch: Mapping[str, Any], model: nn.Module, problem_type: ProblemType) -> Mapping[str, Any]:
    """Return a batch in which pixels without a class have the label -100, as tokens have; other batches as they are.

    Args:
        batch: what the model's forward takes, with labels (B, H, W) of pixels.
        model: the model, whose configuration may name the label that it ignores.
        problem_type: what the head predicts.
    """
    labels = batch.get("labels")
    if not get_likelihood(problem_type).is_per_pixel or not isinstance(labels, Tensor):
        return batch
    return {**batch, "labels": labels.masked_fill(labels == ignored_label(model, problem_type), IGNORED)}
