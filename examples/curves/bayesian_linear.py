"""Bayesian linear regression in closed form: y = X w + noise, w ~ N(0, I / tau), noise ~ N(0, s^2).

    posterior  N(m, P^-1),  P = X^T X / s^2 + tau I,  m = P^-1 X^T y / s^2
    evidence   N(y; 0, X X^T / tau + s^2 I)

A last-layer Laplace posterior of a regression is this posterior, exactly: the GGN of a linear layer is X^T X.
MacKay 1992 (Neural Computation 4(3), 415-447); Bishop 2006, section 3.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearPosterior:
    """N(mean (D,), precision^-1 (D, D)) under the prior precision and the noise that it was computed for."""

    mean: Tensor
    precision: Tensor
    prior_precision: float
    noise_std: float

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and epistemic variance of X w, (N,) each."""
        variance = (features * torch.linalg.solve(self.precision, features.mT).mT).sum(1)
        return features @ self.mean, variance


def with_bias(features: Tensor) -> Tensor:
    """A last column of ones, in float64: (N, D) -> (N, D + 1)."""
    wide = features.double()
    return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)


def posterior(features: Tensor, targets: Tensor, prior_precision: float, noise_std: float) -> LinearPosterior:
    """The posterior of the weights, for features X (N, D) and targets y (N,)."""
    precision = features.mT @ features / noise_std**2 + prior_precision * torch.eye(features.shape[1]).to(features)
    mean = torch.linalg.solve(precision, features.mT @ targets / noise_std**2)
    return LinearPosterior(mean, precision, prior_precision, noise_std)


def log_evidence(features: Tensor, targets: Tensor, prior_precision: float, noise_std: float) -> float:
    """log N(y; 0, X X^T / tau + s^2 I), in nats."""
    covariance = features @ features.mT / prior_precision + noise_std**2 * torch.eye(len(targets)).to(features)
    quadratic = targets @ torch.linalg.solve(covariance, targets)
    return -0.5 * float(quadratic + torch.linalg.slogdet(covariance)[1] + len(targets) * math.log(2 * math.pi))


def tuned_posterior(features: Tensor, targets: Tensor, *, num_rounds: int = 200) -> LinearPosterior:
    """The posterior at the tau and s of largest evidence, by MacKay's fixed point.

    gamma = sum l / (l + tau) weights are determined, l the eigenvalues of X^T X / s^2; then tau = gamma / |m|^2 and
    s^2 = |y - X m|^2 / (N - gamma).
    """
    tau, noise_std = 1.0, float(targets.std())
    eigenvalues = torch.linalg.eigvalsh(features.mT @ features).clamp_min(0)
    for _ in range(num_rounds):
        found = posterior(features, targets, tau, noise_std)
        scaled = eigenvalues / noise_std**2
        gamma = float((scaled / (scaled + tau)).sum())
        tau = gamma / float(found.mean.square().sum())
        noise_std = float(((targets - features @ found.mean).square().sum() / (len(targets) - gamma)).sqrt())
    return posterior(features, targets, tau, noise_std)
