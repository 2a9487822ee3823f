"""The true posterior of a tiny regression network, by which examples.regression judges the others.

Hamiltonian Monte Carlo draws it: a proposal follows H(w, v) = -log p(w) + |v|^2 / 2 for L leapfrog steps from a fresh
momentum v ~ N(0, 1) and is accepted with probability min(1, exp(H - H')), which leaves p invariant whatever the step
size. The step size follows the acceptance rate during the warm-up only. Neal 2011 (arXiv 1206.1901).

The posterior of the last layer alone has a closed form, which a last-layer Laplace posterior of a regression equals:
the GGN of a linear layer is X^T X. MacKay 1992 (Neural Computation 4(3), 415-447); Bishop 2006, section 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeformers import LaplacePosterior
from bayeformers.likelihoods import split_variance_head
from bayeformers.predictive import Predictive

LogDensity = Callable[[Tensor], Tensor]
"""From C chains (C, P) to their log densities (C,), up to a constant."""


# --- The network -----------------------------------------------------------------------------------------------------
class TanhMLP(nn.Module):
    """x (B,) -> tanh layers -> logits (B, num_labels): a mean, or a mean and a log variance (`noise_std="head"`)."""

    def __init__(self, hidden_sizes: Sequence[int] = (50,), num_labels: int = 1) -> None:
        super().__init__()
        fields: dict[str, Any] = {"num_labels": num_labels, "problem_type": "regression"}
        self.config = PretrainedConfig(**fields)
        sizes = [1, *hidden_sizes, num_labels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        for layer in self.linear_layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The layers, from the input on."""
        return cast(list[nn.Linear], list(self.layers))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads: (B, hidden_sizes[-1])."""
        hidden = x.reshape(-1, 1)
        for layer in self.linear_layers[:-1]:
            hidden = layer(hidden).tanh()
        return hidden

    def forward(self, x: Tensor, labels: Tensor | None = None, **_: Any) -> SequenceClassifierOutput:
        """With labels (B,) the output's loss is the squared error."""
        logits: Tensor = self.layers[-1](self.features(x))
        loss = None if labels is None else (logits[:, 0] - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)


# --- Hamiltonian Monte Carlo -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Chains:
    """Draws after the warm-up, (S, C, P), and how the sampler fared."""

    draws: Tensor
    acceptance: float
    step_size: float


def hmc(
    log_density: LogDensity,
    start: Tensor,
    *,
    num_samples: int,
    num_warmup: int,
    num_steps: int,
    step_size: float = 0.01,
    target_acceptance: float = 0.8,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Chains:
    """C chains side by side from ``start`` (C, P): so many draws of each after so many proposals of the warm-up."""
    position, kept, rates = start.detach(), [], []
    value, slope = _value_and_slope(log_density, position)
    for index in tqdm(range(num_warmup + num_samples), "HMC", disable=not progress, leave=False):
        jitter = 0.8 + 0.4 * float(torch.rand((), generator=generator))  # no trajectory closes on itself
        momentum = torch.randn(position.shape, generator=generator, dtype=position.dtype)
        new, new_value, new_slope, end = leapfrog(log_density, position, slope, momentum, step_size * jitter, num_steps)
        gain = new_value - value - 0.5 * (end.square().sum(1) - momentum.square().sum(1))
        probability = gain.clamp_max(0).exp().nan_to_num(0.0)  # a diverged trajectory is refused
        accepted = torch.rand(len(position), generator=generator, dtype=position.dtype) < probability
        position = torch.where(accepted[:, None], new, position)
        value, slope = torch.where(accepted, new_value, value), torch.where(accepted[:, None], new_slope, slope)
        if index < num_warmup:  # Robbins & Monro: steps that fall as 1 / sqrt(n)
            step_size *= float(torch.exp((probability.mean() - target_acceptance) / (1 + index / 10) ** 0.5))
        else:
            kept.append(position)
            rates.append(probability.mean())
    return Chains(torch.stack(kept), float(torch.stack(rates).mean()), step_size)


def leapfrog(
    log_density: LogDensity, position: Tensor, slope: Tensor, momentum: Tensor, step: float, num_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A trajectory: reversible and volume-preserving, so with the momentum negated it leads back.

    From position, gradient of the log density there and momentum, (C, P) each, to position, log density, gradient and
    momentum at the end.
    """
    momentum, value = momentum + 0.5 * step * slope, slope
    for index in range(num_steps):
        position = position + step * momentum
        value, slope = _value_and_slope(log_density, position)
        momentum = momentum + (step if index < num_steps - 1 else 0.5 * step) * slope
    return position, value, slope, momentum


def _value_and_slope(log_density: LogDensity, position: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        value = log_density(position)
        (slope,) = torch.autograd.grad(value.sum(), position)
    return value.detach(), slope


def split_r_hat(values: Tensor) -> Tensor:
    """Gelman & Rubin's ratio of total to within-chain standard deviation, chains halved: (S, C, ...) -> (...).

    1 where all halves agree; above about 1.05 the chains have not mixed.
    """
    half = len(values) // 2
    halves = torch.cat([values[:half], values[half : 2 * half]], dim=1)
    within, between = halves.var(0).mean(0), halves.mean(0).var(0)
    return (((half - 1) / half * within + between) / within).sqrt()


@dataclass(frozen=True)
class MLPRegression:
    """Numbers x (N,) -> the network's layers -> y (N,), Gaussian noise, every weight and bias N(0, prior_std^2).

    ``noise`` is a standard deviation, or "head": the second output is its log variance. Of ``network`` the sizes count.
    """

    network: TanhMLP
    x: Tensor
    y: Tensor
    noise: float | Literal["head"]
    prior_std: float

    def logits(self, weights: Tensor, x: Tensor) -> Tensor:
        """The outputs (S, B, D) of S networks; weights (S, P) as `torch.nn.utils.parameters_to_vector` orders them."""
        hidden, start = x.reshape(1, -1, 1).expand(len(weights), -1, 1), 0
        for index, layer in enumerate(self.network.linear_layers):
            rows, columns = layer.weight.shape
            middle, stop = start + rows * columns, start + rows * columns + rows
            weight = weights[:, start:middle].reshape(-1, rows, columns)
            hidden = torch.baddbmm(weights[:, None, middle:stop], hidden if index == 0 else hidden.tanh(), weight.mT)
            start = stop
        return hidden

    def log_density(self, weights: Tensor) -> Tensor:
        """The log posterior log p(y | x, w) + log N(w; 0, prior_std^2) of S networks (S, P), up to a constant: (S,)."""
        mean, log_variance = self._moments(self.logits(weights, self.x))
        nll = 0.5 * ((self.y - mean).square() * (-log_variance).exp() + log_variance).sum(1)
        return -nll - weights.square().sum(1) / (2 * self.prior_std**2)

    def sample(self, centre: Tensor, *, num_chains: int, seed: int, **options: Any) -> Chains:
        """Draws by `hmc`, whose chains start 0.3 prior standard deviations away from weights (P,)."""
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(num_chains, len(centre), generator=generator)
        return hmc(self.log_density, centre + 0.3 * self.prior_std * start, generator=generator, **options)

    def r_hat(self, chains: Chains) -> float:
        """The largest `split_r_hat` of the first output along the range of x."""
        grid = torch.linspace(float(self.x.min()), float(self.x.max()), 50)
        return float(split_r_hat(torch.stack([self.logits(draw, grid)[..., 0] for draw in chains.draws])).max())

    def predict(self, weights: Tensor, x: Tensor) -> Predictive:
        """What S networks (S, P) say together at x (B,)."""
        mean, log_variance = self._moments(torch.cat([self.logits(part, x) for part in torch.split(weights, 256)]))
        variance = log_variance.exp() if self.noise == "head" else None
        return Predictive(problem_type="regression", values=mean, noise_std=self.noise, noise_variance=variance)

    def _moments(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (...,) of outputs (..., D)."""
        if self.noise == "head":
            mean, log_variance = split_variance_head(logits)
            return mean[..., 0], log_variance[..., 0]
        return logits[..., 0], torch.full_like(logits[..., 0], 2 * math.log(self.noise))


# --- The last layer, exactly -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LinearRegression:
    """y = X w + noise, w ~ N(0, I / tau), noise ~ N(0, s^2): the posterior N(m, P^-1) of features (N, D), targets (N,).

    P = X^T X / s^2 + tau I,  m = P^-1 X^T y / s^2,  evidence N(y; 0, X X^T / tau + s^2 I).
    """

    features: Tensor
    targets: Tensor
    prior_precision: float
    noise_std: float

    @classmethod
    @torch.no_grad()
    def of_last_layer(cls, network: TanhMLP, x: Tensor, y: Tensor) -> LinearRegression:
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
        return torch.linalg.solve(self.precision, self.features.mT @ self.targets / self.noise_std**2)

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
    def tuned(cls, features: Tensor, targets: Tensor, *, num_rounds: int = 200) -> LinearRegression:
        """The posterior at the tau and s of largest evidence, by MacKay's fixed point.

        gamma = sum l / (l + tau) weights are determined, l the eigenvalues of X^T X / s^2; then tau = gamma / |m|^2
        and s^2 = |y - X m|^2 / (N - gamma).
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
    return torch.nn.functional.pad(features.double(), (0, 1), value=1.0)
