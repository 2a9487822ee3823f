"""The likelihoods by name: of a problem type, and of the family that `laplace.fit` takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_choice
from .base import Likelihood
from .classes import CausalLM, Seq2SeqLM, SingleLabel, TokenClassification, Unknown
from .gaussian import Regression
from .multi_label import MultiLabel
from .ordinal import OrdinalRegression
from .question_answering import QuestionAnswering
from .segmentation import SemanticSegmentation

__all__ = ["ProblemType", "check_problem_type", "drawn_values", "families", "get_likelihood", "likelihood_of_family",
           "likelihoods", "register", "token_mask"]  # fmt: skip

ProblemType = str
"""The name of a likelihood: "single_label_classification", "regression", ..., or "unknown"."""

_BY_NAME: dict[str, Likelihood] = {}


def register(likelihood: Likelihood) -> None:
    """Let `config.problem_type`, `predict(problem_type=...)` and, with a family, `laplace.fit(likelihood=...)` name it.

    Raises:
        TypeError: no `Likelihood`.
        ValueError: its name is taken.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"`likelihood` must be an instance of a Likelihood, got {likelihood!r}.")
    if likelihood.problem_type in _BY_NAME:
        raise ValueError(f"`likelihood` {likelihood.problem_type!r} is registered already.")
    _BY_NAME[likelihood.problem_type] = likelihood


for _likelihood in (
    SingleLabel(),  # the first of a family stands for it
    MultiLabel(),
    Regression(),
    OrdinalRegression(),
    TokenClassification(),
    CausalLM(),
    Seq2SeqLM(),
    QuestionAnswering(),
    SemanticSegmentation(),
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


def families() -> tuple[str, ...]:
    """What `laplace.fit(likelihood=...)` takes: "classification", "multilabel", "regression", "ordinal", ..."""
    return tuple(dict.fromkeys(known.family for known in likelihoods() if known.family is not None))


def likelihood_of_family(family: str) -> Likelihood:
    """The likelihood that stands for a family, whose heads share the formula; ValueError for another name."""
    check_choice("likelihood", family, families())
    return next(likelihood for likelihood in likelihoods() if likelihood.family == family)


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
    """Which positions of (B, T, C) belong to the sequence, (B, T) bool; None where every value counts."""
    return get_likelihood(problem_type).attended(values, inputs)


def check_problem_type(problem_type: Any) -> ProblemType:
    """What a caller says that a head predicts; ValueError if there is no such problem type."""
    known = tuple(likelihood.problem_type for likelihood in likelihoods())
    check_choice("problem_type", problem_type, known)
    return str(problem_type)
