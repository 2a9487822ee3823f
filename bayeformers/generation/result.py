"""`Generation`: generated texts, and how sure the posterior is of each token and of each text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..checks import check_choice
from .scoring import SequenceScores, TokenScores

SEQUENCE_SCORES = ("sequence_probability", "mean_mutual_information", "agreement")
"""The names that `Generation.score` takes."""


@dataclass
class Generation:
    """Texts with uncertainties, all entropies in nats.

    The leading axes (*) are (S, R) of ``mixing="draws"`` and (R,) of "average": S draws, R = B inputs times
    ``num_return_sequences``.

    Attributes:
        sequences: token ids with the prompt, (*, T), filled up with padding at the end.
        prompt_length: how many tokens stand before the first generated one.
        mask: which generated tokens count, (*, T - prompt_length): False behind the end of a text.
        mixing: "draws" or "average".
        text: what was generated, decoded, in nested lists; None without a tokenizer.
        token_log_probs: log-probability of each generated token by what generated it: its own network, or the mean of
            all, before any processing of the logits; 0 where the mask is False. None under beams.
        token_entropy: entropy of the distribution that each token was chosen from, likewise.
        agreement: (B,), the share of the most frequent one of an input's answers; None where it has one only.
        clusters: (B, n), which of an input's n answers mean the same; None without ``equivalent``.
        semantic_entropy: (B,), entropy over these clusters, from their frequencies; None likewise.
    """

    sequences: Tensor
    prompt_length: int
    mask: Tensor
    mixing: str
    text: Any = None
    token_log_probs: Tensor | None = None
    token_entropy: Tensor | None = None
    agreement: Tensor | None = None
    clusters: Tensor | None = None
    semantic_entropy: Tensor | None = None
    _scores: TokenScores | None = field(default=None, repr=False)
    _score: Callable[[], TokenScores] | None = field(default=None, repr=False)

    @property
    def token_scores(self) -> TokenScores:
        """What all networks say of each token. Of drawn answers it is computed when it is first asked for.

        Raises:
            RuntimeError: the model's weights have changed since the answers were generated.
        """
        if self._scores is None:
            assert self._score is not None
            self._scores = self._score()
        return self._scores

    @property
    def total(self) -> Tensor:
        """Entropy of the networks' mean next-token distribution, (*, T - prompt_length); 0 where the mask is False."""
        return self.token_scores.total

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the networks' distributions, likewise: what the text leaves open."""
        return self.token_scores.aleatoric

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between token and network, total - aleatoric >= 0: what the model does not know."""
        return self.token_scores.epistemic

    @property
    def sequence_scores(self) -> SequenceScores:
        """Scores of whole texts, (*)."""
        return self.token_scores.of_sequences(self.mask)

    @property
    def sequence_log_prob(self) -> Tensor:
        """Log-probability of each text by what wrote it, (*), in nats.

        Of "average" sum_t log 1/S sum_s p_s(y_t): each token is the mean's. Of "draws" log 1/S sum_s prod_t p_s(y_t):
        one network, drawn at random, writes the whole.
        """
        scores = self.sequence_scores
        return scores.log_prob if self.mixing == "average" else scores.mixture_log_prob

    def score(self, name: str) -> Tensor:
        """Return how sure each text is, (*) in float64, always higher for the surer: what a policy may refuse by.

        Args:
            name: "sequence_probability": exp of `sequence_log_prob`; "mean_mutual_information": minus the mean over
                tokens of the epistemic part, in nats; "agreement": the share of the most frequent of an input's
                answers.

        Raises:
            ValueError: the name is unknown, or an input has one answer only, which agrees with nothing.
        """
        check_choice("score", name, SEQUENCE_SCORES)
        if name == "sequence_probability":
            return self.sequence_log_prob.double().exp()
        if name == "mean_mutual_information":
            return -self.sequence_scores.mutual_information.double()
        if self.agreement is None:
            raise ValueError("`score` cannot be 'agreement' of one answer per input: take `mixing='draws'`.")
        shape = self.sequences.shape[:-1]
        each = self.agreement.double().repeat_interleave(shape[-1] // len(self.agreement))
        return each.expand(shape)
