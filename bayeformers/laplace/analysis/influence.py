"""What one example says about another: inner products of per-example gradients in the metric of the posterior.

    <u, v> = u^T Sigma v,    Sigma = (F / (T s^2) + tau)^-1

is the inner product of natural-gradient descent (Martens & Grosse 2015, arXiv 1503.05671), and with gradients of the
log-likelihood the influence function of Koh & Liang 2017 (arXiv 1703.04730), which Grosse et al. 2023 (arXiv
2308.03296) compute with EK-FAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor, nn

from ...linearized.covariance import reached
from ...linearized.kinds import AffineCaptured, Captured, TableCaptured
from ...linearized.separable import rotated
from ..blocks import LaplaceBlock
from ..moved import as_matrix, by_parameter
from ..posterior import LaplacePosterior, check_laplace
from .gradients import ExampleGradients
from .inner import coordinates_inner, one_position_inner, positions_inner, table_inner


def inner_products(posterior: LaplacePosterior, first: ExampleGradients, second: ExampleGradients) -> Tensor:
    """Return u^T Sigma v for every u of ``first`` and v of ``second``, (B1, B2), Sigma = (F / (T s^2) + tau)^-1.

    sum_l <N1, N2 / Lambda> over the layers: exactly the posterior's precision, no damping split.

    Args:
        posterior: the posterior whose covariance Sigma is the metric.
        first: gradients u of B1 examples, as `example_gradients` gives them.
        second: gradients v of B2 examples; layers that only one of the two has add nothing.

    Raises:
        ValueError: there are gradients of layers that the posterior does not cover.

    >>> from torch import nn
    >>> from bayeformers.laplace import example_gradients, fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], progress=False)
    >>> first, second = (example_gradients(posterior, x[:4], output=c) for c in (0, 1))
    >>> products = inner_products(posterior, first, second)  # J_0 Sigma J_1^T of all pairs of examples
    >>> expected = posterior.predict(x[:4]).logit_covariance[:, 0, 1].float()
    >>> torch.allclose(products.diag(), expected, rtol=1e-3, atol=1e-6)
    True
    """
    blocks = _blocks(posterior, first, second)
    total = next(posterior.model.parameters()).new_zeros(len(first), len(second))
    for name in first.captured:
        if name in second.captured:
            pair = [each.captured[name].under(blocks[name]) for each in (first, second)]
            total = total + _inner(*pair)
    return total


def influence(posterior: LaplacePosterior, test: ExampleGradients, train: ExampleGradients) -> Tensor:
    """Return the change of each test example's loss per unit of weight on each training example, (B_test, B_train).

    d L(z_test) / d weight(z_train) = -(1 / T) grad L(z_test)^T Sigma grad L(z_train), L = -log p (Koh & Liang 2017,
    equation 2, for a loss that is a sum over examples): negative where the training example helps. Leaving an example
    out changes the loss by about minus this. Exact where the loss is quadratic and the mean its minimum under the prior
    of the posterior; T is the posterior's temperature.

    Args:
        posterior: with all training data in its curvature.
        test: `example_gradients` of the log-likelihood; for another quantity than the loss of the test examples give
            its gradients with ``output``, and reverse the sign.
        train: `example_gradients` of the log-likelihood.

    Raises:
        ValueError: there are gradients of layers that the posterior does not cover.

    >>> from bayeformers.laplace import example_gradients, fit
    >>> net, x, y = nn.Linear(3, 2), torch.randn(20, 3), torch.randint(2, (20,))
    >>> posterior = fit(net, [(x, y)], progress=False)
    >>> train = example_gradients(posterior, x, y)
    >>> scores = influence(posterior, train, train)
    >>> scores.shape, bool((scores.diag() < 0).all())  # an example helps itself
    (torch.Size([20, 20]), True)
    """
    return -inner_products(posterior, test, train) / posterior.temperature


def novelty(posterior: LaplacePosterior, examples: ExampleGradients) -> Tensor:
    """Return g^T Sigma g of every example, (B,): large where g points to weights that the data do not determine.

    Of an output, the variance of the linearised network there.

    Raises:
        ValueError: there are gradients of layers that the posterior does not cover.
    """
    blocks = _blocks(posterior, examples)
    total = next(posterior.model.parameters()).new_zeros(len(examples))
    for name, captured in examples.captured.items():
        total = total + replace(captured, block=blocks[name]).covariance()[0, :, 0, 0]
    return total


def similarity(posterior: LaplacePosterior, first: ExampleGradients, second: ExampleGradients) -> Tensor:
    """Return the cosine between gradients in the posterior's metric, (B1, B2), in [-1, 1]; 0 for a gradient of 0.

    Args:
        posterior: the posterior whose covariance is the metric.
        first: gradients of B1 examples.
        second: gradients of B2 examples.

    Raises:
        ValueError: there are gradients of layers that the posterior does not cover.
    """
    norms = [novelty(posterior, each).clamp_min(0).sqrt() for each in (first, second)]
    scale = norms[0][:, None] * norms[1]
    products = inner_products(posterior, first, second)
    return torch.where(scale > 0, products / scale, 0.0).clamp(-1, 1)


def natural_gradient(
    posterior: LaplacePosterior, gradients: Mapping[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Sigma grad: the gradient, preconditioned by the posterior's covariance (Martens & Grosse 2015).

    Args:
        posterior: whose covariance.
        gradients: of every covered Parameter; others are left out of the result.

    Returns:
        Of the Parameters' shapes.

    Raises:
        ValueError: a covered Parameter has no gradient, or one of another shape.

    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], prior_precision=1e6, progress=False)
    >>> step = natural_gradient(posterior, {p: torch.ones_like(p) for p in net.parameters()})
    >>> [f"{step[p].mean():.2g}" for p in net.parameters()]  # a prior that strong rules alone
    ['1e-06', '1e-06']
    """
    found: dict[nn.Parameter, Tensor] = {}
    for block in posterior.blocks():
        for name, parameter in block.parameters.items():
            given = gradients.get(parameter)
            if given is None or given.shape != parameter.shape:
                shape = None if given is None else tuple(given.shape)
                raise ValueError(
                    f"`gradients` must hold {tuple(parameter.shape)} for {block.name}.{name}, got {shape}."
                )
        eigen = block.eigen
        matrix = as_matrix(block.target, gradients, is_flat=block.is_flat).to(eigen.eigenvalues)
        step = eigen.covariance_product(matrix, block.prior_precisions[0], block.likelihood_precision)
        found |= {p: value.to(p) for p, value in by_parameter(block.target, step).items()}
    return found


def _blocks(posterior: LaplacePosterior, *given: ExampleGradients) -> dict[str, LaplaceBlock]:
    """Return the posterior's blocks by name.

    Raises:
        TypeError: these are no gradients of examples.
        ValueError: the posterior lacks one of the gradients' layers.
    """
    check_laplace(posterior)
    for each in given:
        if not isinstance(each, ExampleGradients):
            raise TypeError(f"Gradients must be those of `example_gradients`, got {type(each).__name__}.")
    blocks = {block.name: block for block in posterior.blocks()}
    missing = {name for gradients in given for name in gradients.captured} - set(blocks)
    if missing:
        raise ValueError(f"The gradients are of layers that `posterior` does not cover: {sorted(missing)[:5]}.")
    return blocks


# -- one layer --------------------------------------------------------------------------------------------------------


@singledispatch
def _inner(first: Captured, second: Captured) -> Tensor:
    """u^T Sigma v, (B1, B2), of one block; by coordinates, but for kinds that need not form them."""

    def of(captured: Captured, part: slice) -> Tensor:
        return captured.part(part).coordinates()[:, :, 0].movedim(0, 1)

    counts = (first.inputs.shape[1], second.inputs.shape[1])
    variances = first.block.variances()[0]
    return coordinates_inner(lambda part: of(first, part), lambda part: of(second, part), counts, variances)


@_inner.register
def _inner_affine(first: AffineCaptured, second: Captured) -> Tensor:
    variances = first.block.variances()[0]
    (h1, q1), (h2, q2) = (_in_basis(_trimmed(each)) for each in (first, second))
    if q1.shape[2] == 1 == q2.shape[2]:
        return one_position_inner((h1[:, :, 0], q1[:, :, 0]), (h2[:, :, 0], q2[:, :, 0]), variances)
    return positions_inner((h1, q1), (h2, q2), variances)


@_inner.register
def _inner_table(first: TableCaptured, second: Captured) -> Tensor:
    return table_inner(_looked_up(first), _looked_up(second), first.block.variances()[0, 0])


def _trimmed(captured: Captured) -> Captured:
    """Without positions that no gradient reaches: often the first token alone is left."""
    inputs, grads = reached(captured.inputs, captured.gradients)
    return replace(captured, inputs=inputs, gradients=grads)


def _in_basis(captured: Captured) -> tuple[Tensor, Tensor]:
    """The rotated h = U_G^T g, (K, B, T, d_out), and q = U_A^T a, (K, B, T, d_in')."""
    h, q = captured.gradients[:, :, 0], captured.inputs
    return rotated(h, captured.block.left), rotated(q, captured.block.right)


def _looked_up(captured: Captured) -> tuple[Tensor, Tensor]:
    """Row numbers (B, T), and the gradients (B, T, d) in the basis of a table's features."""
    return captured.inputs[0], rotated(captured.gradients[:, :, 0], captured.block.right)[0]
