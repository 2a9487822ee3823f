"""From start and end logits of a question's windows to one distribution over the spans of its text.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from bayeformers.predictive import Predictive, span_scores
from examples.squad.windows import Reading, Window


@dataclass(frozen=True)
class SpanLogits:
    """A question's logits under S draws: ``start`` and ``end`` (S, W windows, T positions); padding counts nothing."""

    start: Tensor
    end: Tensor


def joined_scores(logits: SpanLogits, windows: Sequence[Window], num_tokens: int, max_length: int) -> Tensor:
    """Scores (S, num_tokens, L) of the spans of a text of ``num_tokens``: [s, i, l] of its tokens i .. i + l."""
    length = min(max_length, num_tokens)
    scores = logits.start.new_full((len(logits.start), num_tokens, length), -torch.inf)
    for index, window in enumerate(windows):
        of_window = span_scores(
            logits.start[:, index, window.context], logits.end[:, index, window.context], max_length
        )
        part = scores[:, window.first : window.first + window.size, : of_window.shape[-1]]
        torch.maximum(part, of_window, out=part)
    return scores


def null_scores(logits: SpanLogits, windows: Sequence[Window]) -> Tensor:
    """Scores (S,) of "no answer"."""
    positions = torch.tensor([window.null for window in windows])
    each = torch.arange(len(windows))
    return (logits.start[:, each, positions] + logits.end[:, each, positions]).min(1).values


@dataclass(frozen=True)
class SpanDistribution:
    """Probabilities of all spans of a question's text, by S draws.

    Attributes:
        reading: the question.
        predictive: log p_s of K outcomes, (S, 1, K) in float64: the spans, starting token after starting token, and,
            where ``has_null``, "no answer" as the last one.
        length: L, spans per starting token.
        has_null: whether "no answer" is an outcome.
    """

    reading: Reading
    predictive: Predictive
    length: int
    has_null: bool

    @property
    def log_probs(self) -> Tensor:
        """Of the averaged prediction, (K,)."""
        return self.predictive.mean_log_probs[0]

    @property
    def answer(self) -> str:
        """The most probable outcome's text; "" is no answer."""
        best = int(self.log_probs.argmax())
        if best == self.null:
            return ""
        first, more = divmod(best, self.length)
        return self.reading.text(first, first + more)

    @property
    def null(self) -> int | None:
        """Which outcome "no answer" is."""
        return len(self.log_probs) - 1 if self.has_null else None

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


def span_distribution(
    reading: Reading, logits: SpanLogits, *, max_length: int, has_null: bool, temperature: float = 1.0
) -> SpanDistribution:
    """softmax(scores / temperature) of each draw over the spans of at most ``max_length`` tokens, and "no answer"."""
    wide = SpanLogits(logits.start.double(), logits.end.double())
    scores = joined_scores(wide, reading.windows, len(reading.offsets), max_length)
    length, outcomes = scores.shape[-1], scores.flatten(1)
    if has_null:
        outcomes = torch.cat([outcomes, null_scores(wide, reading.windows)[:, None]], dim=1)
    log_probs = (outcomes / temperature).log_softmax(-1)
    predictive = Predictive(problem_type="single_label_classification", log_probs=log_probs[:, None])
    return SpanDistribution(reading, predictive, length, has_null)
