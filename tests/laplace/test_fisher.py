"""Exact, Monte-Carlo and empirical curvature, per example and per token, against dense sums over labels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import fit
from tests.laplace.networks import QUIET, batches, classes, fitted, mlp, reader, text
from tests.laplace.reference import (
    Inputs,
    close,
    dense,
    empirical_fisher,
    ggn,
    integers,
    jacobian,
    normal,
    outputs_of,
)

LABELS: dict[str, Tensor] = {
    "classification": classes(6),
    "regression": normal(6, 3, seed=8),
    "multilabel": integers(2, 6, 3, seed=8).double(),
}
each_likelihood = pytest.mark.parametrize("likelihood", LABELS)


def token_task() -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A head per token; padding and one real token have no label."""
    inputs = text(3, length=3)
    labels = classes(3, 3).masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 1] = -100
    return reader(pooled=False), inputs, labels


@pytest.mark.protects("exact_fisher")
@each_likelihood
@pytest.mark.parametrize("labelled", [True, False])
def test_exact_needs_no_labels(likelihood: str, labelled: bool) -> None:
    model, x, y = mlp(), normal(6, 4), LABELS[likelihood]
    given = y if labelled else None
    options: dict[str, Any] = {"likelihood": likelihood, "fisher": "exact"}
    full, diagonal = (fitted(model, x, given, curvature=kind, **options) for kind in ("dense", "diagonal"))
    for layer in full.layers:
        expected = ggn(model, layer, x, y, likelihood)
        close(dense(full.layers[layer]), expected, 1e-12)
        close(diagonal.layers[layer].eigenvalues.flatten(), expected.diagonal(), 1e-12)


@each_likelihood
def test_empirical_is_of_the_labels_gradients(likelihood: str) -> None:
    model, x, y = mlp(), normal(6, 4), LABELS[likelihood]
    options: dict[str, Any] = {"likelihood": likelihood, "fisher": "empirical"}
    posterior = fitted(model, x, y, curvature="dense", **options)
    for layer, eigen in posterior.layers.items():
        close(dense(eigen), empirical_fisher(model, layer, x, y, likelihood), 1e-12)
    with pytest.raises(ValueError, match='`fisher`="empirical" needs labels'):
        fitted(model, x, **options)


def test_exact_tokens_are_dense() -> None:
    """T C backward passes: positions are independent labels, so their columns never share a pass."""
    model, inputs, labels = token_task()
    posterior = fitted(model, inputs, labels, curvature="dense", fisher="exact", target_modules=".+")
    for layer, eigen in posterior.layers.items():
        close(dense(eigen), ggn(model, layer, inputs, labels), 1e-11)


def test_empirical_tokens() -> None:
    """One example's gradient is that of its whole loss."""
    model, inputs, labels = token_task()
    posterior = fitted(model, inputs, labels, curvature="dense", fisher="empirical")
    for layer, eigen in posterior.layers.items():
        close(dense(eigen), empirical_fisher(model, layer, inputs, labels, "classification"), 1e-11)


def test_tokens_without_labels_count_where_attended() -> None:
    model, inputs, _ = token_task()
    labels = classes(3, 3).masked_fill(inputs["attention_mask"] == 0, -100)
    with_labels, without = (fitted(model, inputs, y, curvature="dense", fisher="exact") for y in (labels, None))
    for layer in with_labels.layers:
        close(dense(without.layers[layer]), dense(with_labels.layers[layer]), 1e-12)


def moments(model: nn.Module, layer: str, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of g g^T over all labels that the model could draw, summed over examples."""
    outputs = outputs_of(model, inputs)
    mean = variance = torch.zeros((), dtype=torch.float64)
    for n, rows in enumerate(jacobian(model, layer, inputs)):
        p = outputs[n].reshape(-1, outputs.shape[-1]).softmax(-1)
        counted = (labels[n].reshape(-1) != -100).double()
        first = second = torch.zeros((), dtype=torch.float64)
        for drawn in itertools.product(range(p.shape[1]), repeat=len(p)):
            chance = p[torch.arange(len(p)), torch.tensor(drawn)].prod()
            slope = (p - nn.functional.one_hot(torch.tensor(drawn), p.shape[1])) * counted[:, None]
            gradient = slope.flatten() @ rows.flatten(1)
            outer = torch.outer(gradient, gradient)
            first, second = first + chance * outer, second + chance * outer.square()
        mean, variance = mean + first, variance + second - first.square()
    return mean, variance


@pytest.mark.parametrize("tokens", [False, True])
def test_sampled_labels_estimate_the_exact_curvature(tokens: bool) -> None:
    """M = 300 draws: every entry within 5 standard errors, by the variance over all labels that could be drawn.

    Under 600 entries at 5 sigma fail by chance 4e-4 of the time. Tokens share one backward pass.
    """
    model, inputs, labels = token_task() if tokens else (mlp(), normal(6, 4), classes(6))
    posterior = fitted(model, inputs, labels, curvature="dense", fisher="mc", num_mc_samples=300, seed=1)
    for layer, eigen in posterior.layers.items():
        mean, variance = moments(model, layer, inputs, labels)
        close(mean, ggn(model, layer, inputs, labels), 1e-11)  # unbiased
        allowed = 5 * (variance.clamp_min(0) / 300).sqrt() + 1e-12
        assert bool(((dense(eigen) - mean).abs() < allowed).all())


def test_seeds_of_the_labels() -> None:
    model, x, y = mlp(), normal(6, 4), classes(6)
    first, same, other = (fitted(model, x, y, fisher="mc", curvature="kfac", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.layers["0"].eigenvalues, same.layers["0"].eigenvalues)
    assert not torch.allclose(first.layers["0"].eigenvalues, other.layers["0"].eigenvalues)


def test_every_batch_has_labels_of_its_own() -> None:
    """Two equal batches draw different labels."""
    model, x = mlp(), normal(6, 4)
    options: dict[str, Any] = {"fisher": "mc", "curvature": "dense", "prior_precision": 1.0, **QUIET}
    once, twice = fit(model, [x], **options), fit(model, [x, x], **options)
    assert not torch.allclose(dense(twice.layers["0"]), 2 * dense(once.layers["0"]))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "dense"])
def test_examples_without_a_label_add_no_loss(kind: str) -> None:
    """-100: neither curvature, nor KFAC's average of inputs, nor likelihood, nor N."""
    model, x, y = mlp(), normal(6, 4), classes(6)
    ignored = y.clone()
    ignored[4:] = -100
    some, all_ = fitted(model, x, ignored, curvature=kind), fitted(model, x[:4], y[:4], curvature=kind)
    assert some.record.log_likelihood == pytest.approx(all_.record.log_likelihood)
    for layer in some.layers:
        close(dense(some.layers[layer]), dense(all_.layers[layer]), 1e-12)
    assert some.record.num_data == 4


def test_multilabel_indicators_can_be_ignored() -> None:
    model, x, y = mlp(), normal(6, 4), LABELS["multilabel"].clone()
    y[2, 1] = -100
    posterior = fitted(model, x, y, curvature="dense", likelihood="multilabel")
    p, expected = outputs_of(model, x).sigmoid(), torch.zeros((), dtype=torch.float64)
    for n, rows in enumerate(jacobian(model, "0", x)):
        weights = p[n] * (1 - p[n]) * (y[n] != -100)
        expected = expected + rows.flatten(1).T @ weights.diag() @ rows.flatten(1)
    close(dense(posterior.layers["0"]), expected, 1e-12)


def test_auto_counts_backward_passes() -> None:
    """Exact up to 16 passes of one batch: C - 1 columns at each position."""
    assert fitted(mlp(outputs=17), normal(2, 4), classes(2)).record.config.fisher == "exact"
    assert fitted(mlp(outputs=18), normal(2, 4), classes(2)).record.config.fisher == "mc"
    model = reader(pooled=False)
    for length, expected in ((8, "exact"), (9, "mc")):
        loader = batches(text(2, length=length), classes(2, length))
        found = fit(model, loader, prior_precision=1.0, **QUIET)
        assert found.record.config.fisher == expected
