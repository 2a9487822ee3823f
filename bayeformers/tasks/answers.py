"""From start and end logits of a question's windows to one distribution over spans, and from it to an answer.

Of one draw of the weights, p(span) ~ p(start) p(end) ~ exp(start logit + end logit). All windows of a question share
one normaliser: the probabilities of all spans of its text, and of "no answer" where that is an option, sum to 1. A span
that several windows hold is one span and counts once, with the score of the window that rates it highest. "No answer"
has the score of the class token in the window that rates it *lowest*: there is none in the text only if no window has
one (Devlin et al. 2019, arXiv 1810.04805, section 4.3, and the code that goes with it).

Draws are averaged as probabilities of whole spans. Start and end are independent under one draw, not on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from ..metrics import aurc
from ..predictive import Predictive, span_scores
from .squad import exact_match, f1
from .windows import Reading

Array = NDArray[np.float64]
TEMPERATURES = (0.05, 20.0)  # between which one is sought


def _span_scores(logits: Tensor, reading: Reading, max_length: int) -> Tensor:
    """Scores (S, N tokens, L) of a text's spans from logits (S, W, T, 2): [s, i, l] of i .. i + l, -inf of none."""
    num_tokens = len(reading.offsets)
    scores = logits.new_full((len(logits), num_tokens, min(max_length, num_tokens)), -torch.inf)
    for index, window in enumerate(reading.windows):
        start, end = logits[:, index, window.context].unbind(-1)
        of_window = span_scores(start, end, max_length)
        part = scores[:, window.first : window.first + window.size, : of_window.shape[-1]]
        torch.maximum(part, of_window, out=part)
    return scores


def _null_scores(logits: Tensor, reading: Reading) -> Tensor:
    """Scores (S,) of "no answer" from logits (S, W, T, 2)."""
    positions = torch.tensor([window.null for window in reading.windows])
    return logits[:, torch.arange(len(positions)), positions].sum(-1).min(1).values


@dataclass(frozen=True)
class SpanDistribution:
    """Probabilities of all spans of a question's text, by S draws.

    ``predictive`` has log p_s of K outcomes, (S, 1, K) in float64: the spans, ``length`` of each starting token, token
    after token, and, where ``has_null``, "no answer" as the last one.
    """

    reading: Reading
    predictive: Predictive
    length: int
    has_null: bool

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities of the outcomes, averaged over the draws, (K,)."""
        return self.predictive.mean_log_probs[0]

    @property
    def null(self) -> int | None:
        """Which outcome "no answer" is."""
        return len(self.log_probs) - 1 if self.has_null else None

    @property
    def answer(self) -> str:
        """The most probable outcome's text; "" is no answer."""
        best = int(self.log_probs.argmax())
        if best == self.null:
            return ""
        first, more = divmod(best, self.length)
        return self.reading.text(first, first + more)

    def log_prob(self, first: int, last: int) -> float:
        """Of the span of tokens ``first`` .. ``last``; -inf for one that is longer than spans may be."""
        if last - first >= self.length:
            return -math.inf
        return float(self.log_probs[first * self.length + last - first])

    @property
    def nll(self) -> float:
        """-log p of the truth in nats, averaged over the annotators; infinite if a truth is out of reach."""
        if not self.reading.question.answers:
            return math.inf if self.null is None else -float(self.log_probs[self.null])
        return -sum(self.log_prob(*span) for span in self.reading.gold) / len(self.reading.gold)


@dataclass(frozen=True)
class Answers:
    """One method's answers to N questions; arrays (N,), entropies in nats.

    A text "" is no answer. ``confidence`` is the probability of the answer, ``no_answer`` that there is none (0 where
    this is no option). ``total`` is the entropy over the spans and no answer, ``aleatoric`` the mean entropy of the
    draws, ``epistemic`` the mutual information of span and weights (0 of a point estimate). ``nll`` is -log p of the
    truth, infinite where it is out of reach. ``exact_match``, 0 or 1, and ``f1`` are SQuAD's.
    """

    texts: list[str]
    confidence: Array
    no_answer: Array
    total: Array
    aleatoric: Array
    epistemic: Array
    nll: Array
    exact_match: Array
    f1: Array

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: NDArray[Any]) -> Answers:
        """Those to some of the questions, by a mask or by positions."""
        arrays = {name: value[index] for name, value in vars(self).items() if name != "texts"}
        return Answers([self.texts[i] for i in np.arange(len(self))[index]], **arrays)

    @property
    def doubts(self) -> dict[str, Array]:
        """What can tell wrong answers and unfamiliar questions, (N,) each, larger for more doubtful ones."""
        epistemic = {"mutual information": self.epistemic} if self.epistemic.any() else {}
        return {"span entropy": self.total, "1 - p(answer)": 1 - self.confidence, **epistemic}

    def columns(self) -> dict[str, list[str]]:
        """The answers and their numbers, as columns of a CSV file."""
        numbers = {name: values for name, values in vars(self).items() if name != "texts"}
        return {"answer": self.texts, **{name: [f"{x:.6g}" for x in values] for name, values in numbers.items()}}

    def report(self) -> dict[str, float]:
        """Means over the questions; of the NLL over those whose truth is in reach, whose share stands beside it."""
        reachable = np.isfinite(self.nll)
        scores = {"exact_match": self.exact_match, "f1": self.f1, "confidence": self.confidence}
        spread = {"entropy": self.total, "aleatoric": self.aleatoric, "epistemic": self.epistemic}
        return {
            "questions": len(self),
            **{name: float(values.mean()) for name, values in scores.items()},
            "nll": float(self.nll[reachable].mean()) if reachable.any() else math.nan,
            "in_reach": float(reachable.mean()),
            "aurc": aurc(self.confidence, 1 - self.exact_match),
            "aurc_f1": aurc(self.confidence, 1 - self.f1),
            **{name: float(values.mean()) for name, values in spread.items()},
        }


@dataclass(frozen=True)
class SpanReader:
    """How logits become answers: of at most ``max_length`` tokens, by softmax(scores / temperature) of each draw.

    ``has_null``: whether "no answer" is an option.
    """

    max_length: int
    has_null: bool
    temperature: float = 1.0

    def distribution(self, reading: Reading, logits: Tensor) -> SpanDistribution:
        """Over the spans of a text, from the logits of start and end, (S draws, W windows, T positions, 2)."""
        wide = logits.double()
        scores = _span_scores(wide, reading, self.max_length)
        length, outcomes = scores.shape[-1], scores.flatten(1)
        if self.has_null:
            outcomes = torch.cat([outcomes, _null_scores(wide, reading)[:, None]], dim=1)
        log_probs = (outcomes / self.temperature).log_softmax(-1)
        predictive = Predictive(problem_type="single_label_classification", log_probs=log_probs[:, None])
        return SpanDistribution(reading, predictive, length, self.has_null)

    def answers(self, readings: Sequence[Reading], logits: Sequence[Tensor]) -> Answers:
        """The most probable answer to each question, how sure it is, and how good."""
        rows = [_answer(self.distribution(*pair)) for pair in zip(readings, logits, strict=True)]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return Answers(columns.pop("texts"), **{name: np.array(column) for name, column in columns.items()})

    def nll(self, readings: Sequence[Reading], logits: Sequence[Tensor]) -> Array:
        """-log p of the truths, (N,)."""
        return np.array([self.distribution(*pair).nll for pair in zip(readings, logits, strict=True)])

    def tempered(self, readings: Sequence[Reading], logits: Sequence[Tensor]) -> SpanReader:
        """Return a reader with the temperature of least mean NLL of (validation) questions whose truth is in reach.

        Raises:
            ValueError: There is no such question.
        """
        reachable = np.isfinite(self.nll(readings, logits))
        if not reachable.any():
            raise ValueError(
                "no validation question has its answer in reach: `max_answer_length` is shorter than each, or all are "
                "unanswerable and training has no such question."
            )

        def loss(log_temperature: float) -> float:
            reader = replace(self, temperature=math.exp(log_temperature))
            return float(reader.nll(readings, logits)[reachable].mean())

        bounds = [math.log(end) for end in TEMPERATURES]
        best = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 0.01}).x
        return replace(self, temperature=math.exp(best))


def _answer(distribution: SpanDistribution) -> dict[str, Any]:
    predictive, log_probs, null = distribution.predictive, distribution.log_probs, distribution.null
    is_point = predictive.num_samples == 1  # whose mutual information is 0, not the rounding error of a difference
    text, truths = distribution.answer, distribution.reading.question.truths
    return {
        "texts": text,
        "confidence": float(log_probs.max().exp()),
        "no_answer": 0.0 if null is None else float(log_probs[null].exp()),
        "total": float(predictive.predictive_entropy),
        "aleatoric": float(predictive.expected_entropy),
        "epistemic": 0.0 if is_point else float(predictive.mutual_information),
        "nll": distribution.nll,
        "exact_match": exact_match(text, truths),
        "f1": f1(text, truths),
    }
