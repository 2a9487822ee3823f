"""`MixturePredictive`: a weighted mixture of predictions, exact where its parts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prediction import Predictive

__all__ = ["MixturePredictive", "mixture_of"]


@dataclass(frozen=True, eq=False, kw_only=True)
class MixturePredictive(Predictive):
    r"""The prediction p = sum_k w_k p_k of K parts, of which each may have draws of its own, or a closed form.

    Draw s of part k, which has S_k, counts w_k / S_k in the entropies; a regression's density, mean and variances are
    the mixture's of the parts' own: Var = sum_k w_k (Var_k + (mean_k - mean)^2).

    Attributes:
        parts: what is mixed, K predictives of the same inputs.
        weights: w_k, (K,) in float64, which sum to 1.
        draw_weights: of every draw of ``log_probs`` or ``values``, (S,) in float64, which sum to 1.

    >>> parts = [Predictive(problem_type="single_label_classification", log_probs=torch.tensor([[p]]).log())
    ...          for p in ([0.9, 0.1], [0.1, 0.9])]
    >>> mixed = mixture_of(parts, [0.75, 0.25])
    >>> mixed.probs, mixed.mutual_information
    (tensor([[0.7000, 0.3000]]), tensor([0.2858]))
    """

    parts: tuple[Predictive, ...]
    weights: Tensor
    draw_weights: Tensor

    @property
    def _mean_draw(self) -> Tensor:
        """The average of the draws, in float64 as all sums here: a small difference of entropies is meant."""
        return (self._classes.double().exp() * self._per_draw).sum(0)

    @property
    def _per_draw(self) -> Tensor:
        weights = self.draw_weights.to(self._draws.device)
        return weights.reshape(-1, *[1] * (self._draws.dim() - 1))

    @property
    def predictive_entropy(self) -> Tensor:
        """Total uncertainty of the draws' weighted average, (B, ...)."""
        return _entropy(self._mean_draw).to(self._classes.dtype)

    @property
    def expected_entropy(self) -> Tensor:
        """Aleatoric part, the draws' weighted average of H[p_s], (B, ...)."""
        return self._expected_entropy().to(self._classes.dtype)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic part, the difference of the two, >= 0: the spread within the parts and between them, (B, ...)."""
        difference = _entropy(self._mean_draw) - self._expected_entropy()
        return difference.clamp_min(0).to(self._classes.dtype)

    @property
    def expected_pairwise_kl(self) -> Tensor:
        """Mean of KL(p_s || p_t) over pairs of draws, each by its weight, (B, ...)."""
        mean, log_probs = self._mean_draw, self._classes.double()
        masked = log_probs.where(mean > 0, torch.zeros_like(log_probs))  # 0 log 0 = 0
        cross_entropy = -(mean * (masked * self._per_draw).sum(0)).sum(-1)
        return (cross_entropy - self._expected_entropy()).clamp_min(0).to(self._classes.dtype)

    @property
    def variation_ratio(self) -> Tensor:
        """Share, by weight, of draws whose argmax is not their average's, (B, ...); ties go to the lower class."""
        mean, log_probs = self._mean_draw, self._classes
        rounding = len(log_probs) * torch.finfo(mean.dtype).eps
        decision = (mean >= mean.amax(-1, keepdim=True) - rounding).to(mean.dtype).argmax(-1)
        differs = (log_probs.argmax(-1) != decision).double()
        return (differs * self._per_draw[..., 0]).sum(0).to(log_probs.dtype)

    def _expected_entropy(self) -> Tensor:
        return (_entropy(self._classes.double().exp()) * self._per_draw[..., 0]).sum(0)

    @property
    def mean(self) -> Tensor:
        """A regression's sum_k w_k mean_k: (B,), of several outputs (B, L)."""
        return self._mixed([part.mean for part in self.parts])

    @property
    def epistemic_variance(self) -> Tensor:
        """The variance of a regression's f, within the parts and between them: (B,), (B, L)."""
        mean = self.mean
        return self._mixed([part.epistemic_variance + (part.mean - mean).square() for part in self.parts])

    @property
    def aleatoric_variance(self) -> Tensor:
        """Average of the parts': (B,), (B, L); ValueError where one does not know its noise."""
        return self._mixed([part.aleatoric_variance for part in self.parts])

    def resized(self, size: tuple[int, int]) -> Predictive:
        """As `Predictive.resized`."""
        return mixture_of([part.resized(size) for part in self.parts], self.weights.tolist())

    def _normal_log_prob(self, labels: Tensor) -> Tensor:
        scores = torch.stack([part.log_prob(labels).double() for part in self.parts])
        weights = self.weights.to(scores).reshape(-1, *[1] * (scores.dim() - 1))
        return (scores + weights.log()).logsumexp(0).to(self._values.dtype)

    def _mixed(self, values: Sequence[Tensor]) -> Tensor:
        return sum((w * value for w, value in zip(self.weights.tolist(), values, strict=True)), torch.zeros(()))


def mixture_of(parts: Sequence[Predictive], weights: Sequence[float]) -> MixturePredictive:
    """Return the mixture of predictions of the same inputs.

    Args:
        parts: K >= 1 predictives, of one problem type and shape; they may be mixtures.
        weights: K numbers > 0 that sum to 1.

    Raises:
        ValueError: the parts have other problem types or shapes than the first, or another number than the weights.
    """
    first = parts[0]
    if len(parts) != len(weights):
        raise ValueError(f"`weights` must have one number for each of {len(parts)} parts, got {len(weights)}.")
    for part in parts[1:]:
        if part.problem_type != first.problem_type or part._draws.shape[1:] != first._draws.shape[1:]:
            told = ", ".join(f"{one.problem_type!r} {tuple(one._draws.shape[1:])}" for one in (first, part))
            raise ValueError(f"`parts` must be predictions of one kind and shape, got {told}.")
    device, per_part = first._draws.device, torch.tensor(weights, dtype=torch.float64)
    draws = torch.cat([part._draws.to(device) for part in parts])
    per_draw = [w * _weights_of(part) for w, part in zip(per_part, parts, strict=True)]
    has_values = first.values is not None
    pooled = None
    if not has_values:
        logs = torch.stack([part.mean_log_probs.to(device).double() for part in parts])
        pooled = (logs + per_part.log().to(device).reshape(-1, *[1] * (logs.dim() - 1))).logsumexp(0).to(draws.dtype)
    return MixturePredictive(
        problem_type=first.problem_type,
        log_probs=None if has_values else draws,
        values=draws if has_values else None,
        link_log_probs=pooled,
        mask=first.mask,
        ignored_label=first.ignored_label,
        parts=tuple(parts),
        weights=per_part,
        draw_weights=torch.cat(per_draw),
    )


def _weights_of(part: Predictive) -> Tensor:
    """Of a part's draws, (S_k,), which sum to 1."""
    if isinstance(part, MixturePredictive):
        return part.draw_weights
    return torch.full((part.num_samples,), 1 / part.num_samples, dtype=torch.float64)


def _entropy(probs: Tensor) -> Tensor:
    terms: Tensor = torch.special.entr(probs)
    return terms.sum(-1)
