"""Bayesian linear regression in closed form, against the same model in function space."""

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from examples.data.true_posterior import LinearRegression


def features_and_targets() -> tuple[Tensor, Tensor]:
    features = torch.cat([torch.randn(25, 4), torch.ones(25, 1)], dim=1).double()
    return features, features @ torch.randn(5, dtype=torch.float64) + 0.3 * torch.randn(25, dtype=torch.float64)


def test_linear_posterior_is_the_gaussian_process_of_its_features() -> None:
    """The same model in function space: k(x, x') = x^T x' / tau, conditioned on N points."""
    (features, targets), other = features_and_targets(), torch.randn(6, 5, dtype=torch.float64)
    tau, noise_std = 0.7, 0.4
    kernel = features @ features.mT / tau + noise_std**2 * torch.eye(25, dtype=torch.float64)
    cross = other @ features.mT / tau
    mean = cross @ torch.linalg.solve(kernel, targets)
    covariance = other @ other.mT / tau - cross @ torch.linalg.solve(kernel, cross.mT)
    found = LinearRegression(features, targets, tau, noise_std).predict(other)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], covariance.diagonal())
    evidence = MultivariateNormal(torch.zeros(25, dtype=torch.float64), kernel).log_prob(targets)
    assert LinearRegression(features, targets, tau, noise_std).log_evidence == pytest.approx(evidence.item())


def test_tuned_prior_and_noise_maximise_the_evidence() -> None:
    features, targets = features_and_targets()
    found = LinearRegression.tuned(features, targets)
    best = found.log_evidence
    for factor in (0.99, 1.01):
        worse = (found.prior_precision * factor, found.noise_std), (found.prior_precision, found.noise_std * factor)
        assert all(LinearRegression(features, targets, *pair).log_evidence < best for pair in worse)
