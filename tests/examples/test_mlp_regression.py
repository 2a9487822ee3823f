"""The posterior of a multilayer perceptron's regression against the network itself and torch's distributions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from examples.data.true_posterior import MLPRegression, TanhMLP


def network_of(num_labels: int = 1) -> TanhMLP:
    return TanhMLP((5, 4), num_labels).double()


def regression_of(network: TanhMLP, x: Tensor, y: Tensor, noise: Any = 0.3) -> MLPRegression:
    return MLPRegression(network, x, y, noise, prior_std=0.7)


def test_many_networks_at_once_are_each_of_them() -> None:
    network, x = network_of(2), torch.randn(7, dtype=torch.float64)
    weights = torch.randn(3, len(parameters_to_vector(network.parameters())), dtype=torch.float64)
    stacked = regression_of(network, x, x).logits(weights, x)
    for vector, logits in zip(weights, stacked, strict=True):
        vector_to_parameters(vector, network.parameters())
        torch.testing.assert_close(network(x).logits, logits)


@pytest.mark.parametrize("noise", [0.3, "head"])
def test_log_posterior_is_likelihood_and_prior(noise: Any) -> None:
    network = network_of(2 if noise == "head" else 1)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    y = (2 * x).sin() + 0.2 * torch.randn(9, dtype=torch.float64)
    weights = torch.randn(2, len(parameters_to_vector(network.parameters())), dtype=torch.float64)
    expected = []
    for vector in weights:
        vector_to_parameters(vector, network.parameters())
        logits = network(x).logits
        scale = (0.5 * logits[:, 1]).exp() if noise == "head" else torch.tensor(noise)
        likelihood = Normal(logits[:, 0], scale).log_prob(y).sum()
        expected.append(likelihood + Normal(0.0, 0.7).log_prob(vector).sum())
    found = regression_of(network, x, y, noise).log_density(weights)
    torch.testing.assert_close(found[0] - found[1], expected[0] - expected[1], rtol=1e-5, atol=1e-6)
