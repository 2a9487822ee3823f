"""Per-example gradients and their inner products, against autograd and dense covariance matrices, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from bayeformers.laplace import (
    ExampleGradients,
    LaplacePosterior,
    example_gradients,
    fit,
    influence,
    inner_products,
    natural_gradient,
    novelty,
    similarity,
)
from bayeformers.laplace.analysis import inner
from tests.laplace import reference
from tests.laplace.networks import QUIET, batches, built, classes, fitted, mlp, reader, regression_data, text
from tests.laplace.reference import LOSSES, close, in_matrix_form, logits_in, normal, part


class Mixed(nn.Module):
    """A convolution with groups, one called twice, a transposed Linear and a weight of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 4, 3, groups=2, padding=1)
        self.again = nn.Conv1d(4, 4, 2)
        self.transposed = Conv1D(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))
        x = torch.tanh(self.transposed(x.mT.contiguous()).mean(1))
        return self.head(torch.tanh(self.left(x)) + self.right(x))


class FeaturesFirst(nn.Module):
    """Positions before examples: nothing tells which axis is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


def case(name: str) -> tuple[nn.Module, Any, Tensor, dict[str, Any]]:
    if name == "mixed":
        return built(Mixed()), normal(5, 4, 6), classes(5), {}
    if name == "features-first":
        return built(FeaturesFirst()), normal(4, 4, 3), classes(4), {}
    if name in ("reader", "tokens"):
        model, inputs = reader(pooled=name == "reader"), text()
        labels = classes(6) if name == "reader" else classes(6, 4).masked_fill(inputs["attention_mask"] == 0, -100)
        return model, inputs, labels, {"target_modules": ["table", "query", "value", "norm", "head"]}
    return mlp(), normal(6, 4), classes(6), {}


CASES = ("mlp", "mixed", "reader", "tokens", "features-first")
each_case = pytest.mark.parametrize("name", CASES)
each_curvature = pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal", "dense"])


def brute_force(posterior: LaplacePosterior, inputs: Any, labels: Tensor, likelihood: str = "classification") -> Any:
    """Layer -> gradient of log p of each example, (B, K, d_out, d_in'), one backward pass through the model each."""
    model = posterior.model
    found: dict[str, list[Tensor]] = {target.name: [] for target in posterior.targets}
    for n in range(len(labels)):
        one = part(inputs, n)
        parameters = dict(model.named_parameters())
        args, kwargs = ((one,), {}) if isinstance(one, Tensor) else ((), dict(one))
        loss = LOSSES[likelihood](logits_in(functional_call(model, parameters, args, kwargs)), labels[n : n + 1])
        for target in posterior.targets:
            grads = torch.autograd.grad(-loss, list(target.parameters.values()), retain_graph=True)
            given = {key: grad[None] for key, grad in zip(target.parameters, grads, strict=True)}
            found[target.name].append(in_matrix_form(target.modules[0], given)[0])
    return {name: torch.stack(values) for name, values in found.items()}


def sigma(posterior: LaplacePosterior, layer: str) -> Tensor:
    """(scale F + tau)^-1 by Kronecker products and an inverse."""
    tau = posterior.prior_precision
    f = reference.dense(posterior.layers[layer])
    value = tau if isinstance(tau, float) else tau[layer]
    return torch.linalg.inv(posterior.likelihood_precision * f + value * torch.eye(len(f), dtype=f.dtype))


def dense_products(posterior: LaplacePosterior, first: Any, second: Any) -> Tensor:
    total: Any = 0
    for layer in first:
        total = total + first[layer].flatten(1) @ sigma(posterior, layer) @ second[layer].flatten(1).T
    return total


# ----------------------------------------------------------------------------------------------------------- gradients


@each_case
def test_matrices_are_those_of_autograd(name: str) -> None:
    model, inputs, labels, options = case(name)
    posterior = fitted(model, inputs, labels, curvature="kfac", **options)
    found = example_gradients(posterior, inputs, labels)
    expected = brute_force(posterior, inputs, labels)
    assert found.layers == list(expected) and len(found) == len(labels)
    for layer in found.layers:
        close(found.matrix(layer), expected[layer])


@each_curvature
@pytest.mark.parametrize("name", ["mlp", "mixed"])
def test_coordinates_are_in_the_eigenbasis(name: str, curvature: Any) -> None:
    model, inputs, labels, options = case(name)
    posterior = fitted(model, inputs, labels, curvature=curvature, **options)
    found = example_gradients(posterior, inputs, labels)
    for layer, eigen in posterior.layers.items():
        matrix = found.matrix(layer).flatten(1) @ reference.basis(eigen)
        close(found.coordinates(layer).flatten(1), matrix)


def test_factors_of_one_position_are_the_pair() -> None:
    model, inputs, labels, _ = case("mlp")
    found = example_gradients(fitted(model, inputs, labels, curvature="kfac"), inputs, labels)
    a, g = found.inputs("2"), found.gradients("2")
    assert a.shape == (1, 6, 1, 6) and g.shape == (1, 6, 1, 3)
    close(a[0, :, 0], torch.cat([torch.tanh(model[0](inputs)), torch.ones(6, 1).double()], 1))
    close(g[0, :, 0], torch.eye(3, dtype=torch.float64)[labels] - model(inputs).softmax(-1))


def test_gradient_of_an_output() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="kfac")
    found = example_gradients(posterior, inputs, output=1)
    rows = torch.stack(reference.jacobian(model, "0", inputs))
    close(found.matrix("0"), rows[:, 1])


def test_gradient_of_an_output_of_one_token() -> None:
    model, inputs, labels, options = case("tokens")
    posterior = fitted(model, inputs, labels, curvature="kfac", **options)
    rows = torch.stack(reference.jacobian(model, "query", inputs)).unflatten(1, (4, 3))
    close(example_gradients(posterior, inputs, output=(2, 1)).matrix("query")[:1], rows[:1, 2, 1])


def test_noise_enters_the_gradient() -> None:
    x, y = regression_data()
    model = built(nn.Linear(3, 2))
    posterior = fitted(model, x, y, likelihood="regression", noise_std=0.5)
    expected = brute_force(posterior, x, y, "regression")[""] / 0.25
    close(example_gradients(posterior, x, y).matrix(""), expected)


def test_labels_inside_the_inputs() -> None:
    model, inputs, labels, options = case("reader")
    posterior = fitted(model, inputs, labels, curvature="kfac", **options)
    inside = example_gradients(posterior, {**inputs, "labels": labels})
    close(inside.matrix("head"), example_gradients(posterior, inputs, labels).matrix("head"), 1e-15)


def test_training_mode_comes_back_and_no_gradient_is_left() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="kfac")
    model.train()
    example_gradients(posterior, inputs, labels)
    assert model.training and all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------- inner products


@each_curvature
@each_case
def test_inner_products_are_dense(name: str, curvature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "CHUNK_ELEMENTS", 64)  # several chunks
    model, inputs, labels, options = case(name)
    posterior = fitted(model, inputs, labels, curvature=curvature, temperature=0.5, **options)
    rows = slice(0, len(labels) - 1)
    first, second = (example_gradients(posterior, part(inputs, r), labels[r]) for r in (rows, slice(None)))
    expected = brute_force(posterior, inputs, labels)
    products = dense_products(posterior, {k: v[rows] for k, v in expected.items()}, expected)
    close(inner_products(posterior, first, second), products)
    close(novelty(posterior, second)[:-1], products.diagonal())


def test_another_prior_needs_no_other_gradients() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="kfac")
    found = example_gradients(posterior, inputs, labels)
    other = posterior.with_prior_precision({"0": 0.3, "2": 7.0})
    expected = brute_force(posterior, inputs, labels)
    close(inner_products(other, found, found), dense_products(other, expected, expected))


@pytest.mark.parametrize("name", ["mlp", "reader"])
def test_gradients_serve_a_posterior_of_another_form(name: str) -> None:
    """Of the same layers; each is judged by the other's covariance, Kronecker-factored or dense."""
    model, inputs, labels, options = case(name)
    made = [fitted(model, inputs, labels, curvature=curvature, **options) for curvature in ("kfac", "full")]
    gradients = [example_gradients(posterior, inputs, output=0) for posterior in made]
    for posterior in made:
        first, second = (inner_products(posterior, each, each) for each in gradients)
        close(first, second, 1e-10)


def test_novelty_of_an_output_is_its_variance() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="kfac")
    found = novelty(posterior, example_gradients(posterior, inputs, output=2))
    close(found, posterior.linearize(inputs)[1][:, 2, 2])


def test_similarity_is_a_cosine() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="ekfac")
    found = example_gradients(posterior, inputs, labels)
    products = dense_products(posterior, *[brute_force(posterior, inputs, labels)] * 2)
    norm = products.diagonal().sqrt()
    close(similarity(posterior, found, found), products / torch.outer(norm, norm))


def test_similarity_to_a_zero_gradient_is_zero() -> None:
    model, inputs, labels, options = case("tokens")
    posterior = fitted(model, inputs, labels, curvature="kfac", **options)
    ignored = example_gradients(posterior, inputs, torch.full_like(labels, -100))
    assert bool((similarity(posterior, ignored, ignored) == 0).all())


def test_influence_is_the_derivative_of_the_refitted_loss() -> None:
    """Ridge regression: the minimum under weights w is (X^T diag(w) X / s^2 + tau)^-1 X^T diag(w) y / s^2."""
    x, y = regression_data(count=9, d_in=3, outputs=1)
    noise, tau, z, target = 0.4, 1.7, normal(2, 3, seed=8), normal(2, 1, seed=9)

    def refitted(weights: Tensor) -> Tensor:
        gram = (x * weights[:, None]).T @ x / noise**2 + tau * torch.eye(3, dtype=x.dtype)
        return torch.linalg.solve(gram, (x * weights[:, None]).T @ y / noise**2)

    def losses(weights: Tensor) -> Tensor:
        return 0.5 * (target - z @ refitted(weights)).square().squeeze(1) / noise**2

    ones = torch.ones(9, dtype=x.dtype)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(refitted(ones).T)
    posterior = fitted(model, x, y, likelihood="regression", noise_std=noise, prior_precision=tau, curvature="kfac")
    test, train = example_gradients(posterior, z, target), example_gradients(posterior, x, y)
    expected = torch.autograd.functional.jacobian(losses, ones)
    close(influence(posterior, test, train), expected)
    close(influence(posterior.with_temperature(2.0), test, train), _tempered(losses, x, y, noise, tau, z, target))


def _tempered(losses: Any, x: Tensor, y: Tensor, noise: float, tau: float, z: Tensor, target: Tensor) -> Tensor:
    """The derivative at the same mean when the likelihood, weights included, is to the power 1/2."""
    precision = x.T @ x / (2 * noise**2) + tau * torch.eye(3, dtype=x.dtype)
    mean = torch.linalg.solve(x.T @ x / noise**2 + tau * torch.eye(3, dtype=x.dtype), x.T @ y / noise**2)
    gradient = (z @ mean - target) * z / noise**2
    moved = torch.linalg.solve(precision, ((y - x @ mean) * x / (2 * noise**2)).T)
    return gradient @ moved


@each_curvature
@pytest.mark.parametrize("name", ["mlp", "mixed", "reader"])
def test_natural_gradient_is_dense(name: str, curvature: Any) -> None:
    model, inputs, labels, options = case(name)
    posterior = fitted(model, inputs, labels, curvature=curvature, **options)
    parameters = {p: normal(*p.shape, seed=n) for n, p in enumerate(model.parameters())}
    found = natural_gradient(posterior, parameters)
    assert set(found) == set(posterior.random_parameters())
    for target in posterior.targets:
        vectors = [
            in_matrix_form(target.modules[0], {key: given[p][None] for key, p in target.parameters.items()}).flatten()
            for given in (parameters, found)
        ]
        close(vectors[1], sigma(posterior, target.name) @ vectors[0])


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors() -> None:
    model, inputs, labels, _ = case("mlp")
    posterior = fitted(model, inputs, labels, curvature="kfac")
    found = example_gradients(posterior, inputs, labels)
    with pytest.raises(ValueError, match="`labels` or `output`"):
        example_gradients(posterior, inputs)
    with pytest.raises(ValueError, match="exclude each other"):
        example_gradients(posterior, inputs, labels, output=0)
    for output in (3, (0, 1)):
        with pytest.raises(ValueError, match="`output` must be a column"):
            example_gradients(posterior, inputs, output=output)
    with pytest.raises(ValueError, match=r"`layer` must be one of \['0', '2'\]"):
        found.matrix("1")
    with pytest.raises(ValueError, match="does not cover: \\['0'\\]"):
        inner_products(fit(model, batches(inputs, labels), subset="last_layer", **QUIET), found, found)
    with pytest.raises(ValueError, match=r"`gradients` must hold \(5, 4\) for 0.weight, got None"):
        natural_gradient(posterior, {})


def test_empty_sum_of_layers() -> None:
    posterior = fitted(mlp(), normal(6, 4), classes(6), curvature="kfac")
    assert bool((inner_products(posterior, *[ExampleGradients({}, 2)] * 2) == 0).all())
