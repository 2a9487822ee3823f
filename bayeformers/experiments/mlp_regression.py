"""The true posterior of a multilayer perceptron's regression: its density for many sets of weights at once.

With `hmc` it gives the reference that other posteriors of a tiny network are judged by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from ..likelihoods import split_variance_head
from ..predictive import Predictive
from .hmc import Chains, hmc, split_r_hat

__all__ = ["MLPRegression", "TanhMLP"]


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


@dataclass(frozen=True)
class MLPRegression:
    """Numbers x (N,) -> linear layers with tanh between them -> y (N,), Gaussian noise, weights N(0, prior_std^2).

    Attributes:
        network: one network, for the sizes of its layers.
        x: numbers, (N,).
        y: numbers, (N,).
        noise: the noise's standard deviation, or "head": the second output is its log variance.
        prior_std: standard deviation of every weight and bias.
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
        """Draws of the posterior by `hmc`, whose chains start around some weights.

        Args:
            centre: the weights, (P,).
            num_chains: chains, run at once; they start 0.3 prior standard deviations away.
            seed: of all random numbers.
            options: of `hmc`.

        Returns:
            Draws (S, num_chains, P).
        """
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
        mean = logits[..., 0]
        return mean, torch.full_like(mean, 2 * math.log(self.noise))
