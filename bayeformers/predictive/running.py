"""`RunningPredictive`: what draws say about a batch, one draw at a time in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["RunningPredictive"]

_WITHOUT_FLOAT64 = ("mps",)


class RunningPredictive:
    """Running averages over draws of :func:`~bayeformers.predictive.drawn_values`; equal to `Predictive` to rounding.

    For class probabilities it keeps logsumexp_s log p_s and sum_s H[p_s], for a regression Welford's mean and sum of
    squared deviations. Class probabilities are summed in float64 where the device has it: a small mutual information
    is the difference of two large entropies. What is read has the dtype of the draws.

    >>> running = RunningPredictive()
    >>> for log_probs in torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]]).log():
    ...     running.update(log_probs)
    >>> running.mean_log_probs.exp(), running.mutual_information
    (tensor([[0.5000, 0.5000]]), tensor([0.3681]))
    """

    def __init__(self) -> None:
        self.num_samples = 0
        self._dtype = torch.float32
        self._log_sum = self._entropy_sum = self._mean = self._squares = torch.empty(0)

    def update(self, log_probs: Tensor) -> None:
        """One more draw of log-probabilities, (B, ..., C)."""
        self._dtype = log_probs.dtype
        log_probs = log_probs if log_probs.device.type in _WITHOUT_FLOAT64 else log_probs.double()
        entropy = _entropy(log_probs)
        first = self.num_samples == 0
        self._log_sum = log_probs if first else torch.logaddexp(self._log_sum, log_probs)
        self._entropy_sum = entropy if first else self._entropy_sum + entropy
        self.num_samples += 1

    def update_values(self, values: Tensor) -> None:
        """One more draw of a regression's values, (B,)."""
        if self.num_samples == 0:
            self._mean, self._squares = torch.zeros_like(values), torch.zeros_like(values)
        self.num_samples += 1
        shift = values - self._mean
        self._mean = self._mean + shift / self.num_samples
        self._squares = self._squares + shift * (values - self._mean)

    @property
    def mean_log_probs(self) -> Tensor:
        """The average log p = logsumexp_s log p_s - log S, (B, ..., C)."""
        return self._mean_log_probs().to(self._dtype)

    @property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty H[p] in nats, (B, ...)."""
        return _entropy(self._mean_log_probs()).to(self._dtype)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part mean_s H[p_s], (B, ...)."""
        return (self._entropy_sum / self.num_samples).to(self._dtype)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part H[p] - mean_s H[p_s], clamped at 0, (B, ...)."""
        difference = _entropy(self._mean_log_probs()) - self._entropy_sum / self.num_samples
        return difference.clamp_min(0).to(self._dtype)

    @property
    def mean(self) -> Tensor:
        """A regression's mean_s f_s, (B,)."""
        return self._mean

    @property
    def epistemic_variance(self) -> Tensor:
        """A regression's mean_s (f_s - mean)^2, (B,)."""
        return self._squares / self.num_samples

    def _mean_log_probs(self) -> Tensor:
        return self._log_sum - math.log(self.num_samples)


def _entropy(log_probs: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(log_probs.exp())  # 0 log 0 = 0
    return terms.sum(dim=-1)
