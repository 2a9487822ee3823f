"""Bayesian linear regression in closed form: y = X w + noise, w ~ N(0, I / tau), noise ~ N(0, s^2).

    posterior  N(m, P^-1),  P = X^T X / s^2 + tau I,  m = P^-1 X^T y / s^2
    evidence   N(y; 0, X X^T / tau + s^2 I)

A last-layer Laplace posterior of a regression is this posterior, exactly: the GGN of a linear layer is X^T X.
MacKay 1992 (Neural Computation 4(3), 415-447); Bishop 2006, section 3.5.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..laplace import LaplacePosterior
from .mlp_regression import TanhMLP

__all__ = ["LinearRegression"]


@dataclass(frozen=True)
class LinearRegression:
    """The posterior of the weights under a prior precision and a noise, for features (N, D) and targets (N,)."""

    features: Tensor
    targets: Tensor
    prior_precision: float
    noise_std: float

    @classmethod
    @torch.no_grad()
    def of_last_layer(cls, network: TanhMLP, x: Tensor, y: Tensor) -> "LinearRegression":
        """The exact posterior, in float64, of a network's last layer, whose weights become its mean."""
        exact = cls.tuned(_with_bias(network.features(x)), y.double())
        last = network.linear_layers[-1]
        last.weight.copy_(exact.mean[None, :-1])
        last.bias.copy_(exact.mean[-1:])
        return exact

    @torch.no_grad()
    def difference_from(self, posterior: LaplacePosterior, network: TanhMLP, x: Tensor) -> dict[str, float]:
        """What a last-layer Laplace posterior at this tau, s and mean says otherwise at x (N,): rounding."""
        mean, variance = self.predict(_with_bias(network.features(x)))
        predictive = posterior.predict({"x": x})
        return {
            "mean": float((predictive.mean - mean).abs().max()),
            "epistemic_std": float((predictive.epistemic_variance.sqrt() - variance.sqrt()).abs().max()),
            "log_marginal_likelihood": posterior.log_marginal_likelihood - self.log_evidence,
        }

    @cached_property
    def precision(self) -> Tensor:
        """P, (D, D)."""
        eye = torch.eye(self.features.shape[1]).to(self.features)
        return self.features.mT @ self.features / self.noise_std**2 + self.prior_precision * eye

    @cached_property
    def mean(self) -> Tensor:
        """The weights' mean m, (D,)."""
        mean: Tensor = torch.linalg.solve(self.precision, self.features.mT @ self.targets / self.noise_std**2)
        return mean

    @property
    def log_evidence(self) -> float:
        """The log marginal likelihood log N(y; 0, X X^T / tau + s^2 I), in nats."""
        eye = torch.eye(len(self.targets)).to(self.features)
        covariance = self.features @ self.features.mT / self.prior_precision + self.noise_std**2 * eye
        quadratic = self.targets @ torch.linalg.solve(covariance, self.targets)
        constant = len(self.targets) * math.log(2 * math.pi)
        return -0.5 * float(quadratic + torch.linalg.slogdet(covariance)[1] + constant)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and epistemic variance of X w at other features, (N,) each."""
        variance = (features * torch.linalg.solve(self.precision, features.mT).mT).sum(1)
        return features @ self.mean, variance

    @classmethod
    def tuned(cls, features: Tensor, targets: Tensor, *, num_rounds: int = 200) -> "LinearRegression":
        """The posterior at the tau and s of largest evidence, by MacKay's fixed point.

        gamma = sum l / (l + tau) weights are determined, l the eigenvalues of X^T X / s^2; then tau = gamma / |m|^2
        and s^2 = |y - X m|^2 / (N - gamma).

        Args:
            features: X, (N, D).
            targets: y, (N,).
            num_rounds: of the fixed point.

        Returns:
            The posterior, whose tau and s are attributes.
        """
        tau, noise_std = 1.0, float(targets.std())
        eigenvalues = torch.linalg.eigvalsh(features.mT @ features).clamp_min(0)
        for _ in range(num_rounds):
            found = cls(features, targets, tau, noise_std)
            scaled = eigenvalues / noise_std**2
            gamma = float((scaled / (scaled + tau)).sum())
            tau = gamma / float(found.mean.square().sum())
            noise_std = float(((targets - features @ found.mean).square().sum() / (len(targets) - gamma)).sqrt())
        return cls(features, targets, tau, noise_std)


def _with_bias(features: Tensor) -> Tensor:
    """A last column of ones, in float64: (N, D) -> (N, D + 1)."""
    wide = features.double()
    return torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)
