"""What the networks said of each token, noted while they generate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class Recorder(StoppingCriteria):
    """Notes entropies, the chosen token's log-probabilities, and where the caller's own criteria stop a text.

    Attributes:
        criteria: of the caller, who are asked here so that it is known which texts they end.
        lengths: number of tokens after which they ended a text (R,), -1 where they have not; None before a token.
        prompt_length: number of tokens that stand before the first generated one.
        total: per step the entropy of the mean distribution (R,), in nats.
        aleatoric: per step the mean entropy of the networks (R,).
        token_log_probs: per step log p_s of the chosen token (S, R).
    """

    def __init__(self) -> None:
        self.prompt_length: int | None = None
        self.total: list[Tensor] = []
        self.aleatoric: list[Tensor] = []
        self.token_log_probs: list[Tensor] = []
        self.criteria: Sequence[StoppingCriteria] = ()
        self.lengths: Tensor | None = None
        self._latest: Tensor | None = None

    def step(self, log_probs: Tensor) -> Tensor:
        """Note the networks' next-token log-probabilities (S, R, V), and return those of their mean (R, V)."""
        mean = log_probs[0] if len(log_probs) == 1 else log_probs.logsumexp(0) - math.log(len(log_probs))
        own = entropy(log_probs)
        self.total.append(own[0] if len(own) == 1 else entropy(mean))
        self.aleatoric.append(own.mean(0))
        self._latest = log_probs
        return mean

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Transformers calls it when a token has been chosen: ``input_ids`` (R, T) ends with it."""
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1
        if self._latest is not None and self._latest.shape[1] == len(input_ids):
            chosen = input_ids[:, -1].to(self._latest.device).expand(len(self._latest), -1)
            self.token_log_probs.append(self._latest.gather(-1, chosen[..., None])[..., 0])
            self._latest = None
        stopped = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.criteria:
            stopped = stopped | criterion(input_ids, scores, **kwargs)
        if self.lengths is None:
            self.lengths = torch.full_like(input_ids[:, 0], -1)
        if len(self.lengths) == len(stopped):
            self.lengths[stopped & (self.lengths < 0)] = input_ids.shape[1] - self.prompt_length
        return stopped


def entropy(log_probs: Tensor) -> Tensor:
    """-sum_v p_v log p_v in nats, 0 log 0 = 0: (*, V) -> (*)."""
    return -(log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)
