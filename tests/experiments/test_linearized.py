"""Functions drawn from a linearised network: the tangent, its variance, and a last layer, which is its own tangent."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayeformers import LaplacePosterior, laplace
from bayeformers.experiments import linearized_draws
from examples.data.true_posterior import TanhMLP


def laplace_of(size: int, **options: Any) -> tuple[TanhMLP, Tensor, LaplacePosterior]:
    """A network, points, and the Laplace posterior around its weights."""
    network, x = TanhMLP((5, 4)).double().eval(), torch.linspace(-2, 2, size, dtype=torch.float64)
    y = (2 * x).sin() + 0.2 * torch.randn(size, dtype=torch.float64)
    options = {"curvature": "full", "prior_precision": "marglik", **options}
    batches = [{"x": x, "labels": y}]
    return network, x, laplace.fit(network, batches, likelihood="regression", progress=False, **options)


def test_linearised_draws_are_the_tangent_at_the_trained_weights() -> None:
    """Against a central difference of the network along the same draw."""
    network, x, posterior = laplace_of(30)
    mean = parameters_to_vector(network.parameters()).detach().clone()
    found, step = linearized_draws(posterior, {"x": x}, num_samples=2, seed=3), 1e-4
    with torch.no_grad():
        for index in range(2):
            with posterior.draw(index, seed=3):
                change = parameters_to_vector(network.parameters()) - mean
            ends, twin = [], copy.deepcopy(network)
            for sign in (1, -1):
                vector_to_parameters(mean + sign * step * change, twin.parameters())
                ends.append(twin(x).logits)
            expected = network(x).logits + (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(found[index], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parameters_to_vector(network.parameters()), mean, rtol=0, atol=0)


def test_linearised_draws_have_the_linearised_variance() -> None:
    (_, x, posterior), size = laplace_of(8), 600
    draws = linearized_draws(posterior, {"x": x}, num_samples=size)[..., 0]
    predictive = posterior.predict({"x": x})
    ratio = draws.var(0) / predictive.epistemic_variance
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / size)  # of a chi-square variable
    error = (predictive.epistemic_variance / size).sqrt()
    assert ((draws.mean(0) - predictive.mean).abs() < 4.5 * error).all()


def test_linearised_draws_of_a_last_layer_are_the_network_itself() -> None:
    _, x, posterior = laplace_of(30, subset="last_layer", prior_precision=1.0)
    draws = linearized_draws(posterior, {"x": x}, num_samples=3, seed=1)[..., 0]
    sampled = posterior.predict({"x": x}, method="sample", num_samples=3, seed=1).values
    torch.testing.assert_close(draws, sampled)
