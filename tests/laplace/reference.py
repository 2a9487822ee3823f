"""Brute force for the Laplace tests: dense Jacobians and curvature by autograd, one example at a time, in float64.

Nothing of the package is used: no hooks, no rules, no loss-Hessian columns. A layer's parameters stand in matrix form
(K, d_out, d_in'), written out here by hand, and are flattened row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

Inputs = Mapping[str, Any] | Tensor
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "classification": lambda f, y: F.cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum"),
    "regression": lambda f, y: 0.5 * (f - y.reshape(f.shape)).square().sum(),
    "multilabel": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
}
"""Summed negative log-likelihoods, up to constants; a regression's at noise 1."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Uniform in [0, high)."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def logits_in(output: Any) -> Tensor:
    """A model's tensor, or its ``logits``."""
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def part(inputs: Inputs, index: int | slice) -> Inputs:
    """One example as a batch of one, or a slice of the batch."""
    rows = slice(index, index + 1) if isinstance(index, int) else index
    return inputs[rows] if isinstance(inputs, Tensor) else {name: value[rows] for name, value in inputs.items()}


def in_matrix_form(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """(R, *shape) tensors of "weight" and "bias" as (R, K, d_out, d_in')."""
    if isinstance(module, nn.Embedding):
        return tensors["weight"].unsqueeze(1)
    if type(module).__name__.endswith("Norm"):
        return torch.stack([value.flatten(1) for value in tensors.values()], dim=1).unsqueeze(1)
    groups, columns = getattr(module, "groups", 1), []
    for name, value in tensors.items():
        value = value.mT if isinstance(module, Conv1D) and name == "weight" else value
        if isinstance(module, _ConvTransposeNd) and name == "weight":
            value = value.unflatten(1, (groups, -1)).transpose(2, 3).flatten(1, 2)
        columns.append(value.reshape(len(value), groups, value.shape[1] // groups, -1))
    return torch.cat(columns, dim=-1)


def jacobian(model: nn.Module, layer: str, inputs: Inputs, names: Sequence[str] = ("weight", "bias")) -> list[Tensor]:
    """For each example: (outputs, K, d_out, d_in'), outputs of every position flattened."""
    module = model.get_submodule(layer)
    values = {n: p.detach() for n in names if (p := getattr(module, n, None)) is not None}
    count = len(inputs if isinstance(inputs, Tensor) else next(iter(inputs.values())))
    found = []
    for n in range(count):
        one = part(inputs, n)

        def outputs(*tensors: Tensor, one: Inputs = one) -> Tensor:
            weights = {f"{layer}.{name}".lstrip("."): value for name, value in zip(values, tensors, strict=True)}
            args, kwargs = ((one,), {}) if isinstance(one, Tensor) else ((), dict(one))
            return logits_in(functional_call(model, weights, args, kwargs, tie_weights=True)).flatten()

        with sdpa_kernel(SDPBackend.MATH):
            rows = torch.autograd.functional.jacobian(outputs, tuple(values.values()))
        found.append(in_matrix_form(module, dict(zip(values, rows, strict=True))))
    return found


def loss_hessian(outputs: Tensor, labels: Tensor, likelihood: str) -> Tensor:
    """Of one example's summed loss in its flattened outputs, (outputs, outputs)."""
    size = outputs.numel()
    hessian = torch.autograd.functional.hessian(lambda f: LOSSES[likelihood](f, labels), outputs)
    return hessian.reshape(size, size)


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Logits."""
    return logits_in(model(inputs) if isinstance(inputs, Tensor) else model(**inputs))


def ggn(
    model: nn.Module, layer: str, inputs: Inputs, labels: Tensor, likelihood: str = "classification", **options: Any
) -> Tensor:
    """sum_n J_n^T H_n J_n of one layer, (p, p)."""
    outputs = outputs_of(model, inputs)
    total = torch.zeros((), dtype=torch.float64)
    for n, rows in enumerate(jacobian(model, layer, inputs, **options)):
        flat = rows.flatten(1)
        total = total + flat.T @ loss_hessian(outputs[n : n + 1], labels[n : n + 1], likelihood) @ flat
    return total


def empirical_fisher(model: nn.Module, layer: str, inputs: Inputs, labels: Tensor, likelihood: str) -> Tensor:
    """sum_n of outer products of the loss's gradients, (p, p)."""
    outputs, total = outputs_of(model, inputs), torch.zeros((), dtype=torch.float64)
    for n, rows in enumerate(jacobian(model, layer, inputs)):
        f = outputs[n : n + 1].clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(LOSSES[likelihood](f, labels[n : n + 1]), f)
        gradient = slope.flatten() @ rows.flatten(1)
        total = total + torch.outer(gradient, gradient)
    return total


def kronecker(gradients: Tensor, inputs: Tensor) -> Tensor:
    """Dense G (x) A of factors (K, ., .), zero between the K blocks."""
    return torch.block_diag(*[
        torch.kron(g.contiguous(), a.contiguous()) for g, a in zip(gradients, inputs, strict=True)
    ])


def basis(eigen: Any) -> Tensor:
    """U = U_G (x) U_A of a `KroneckerEigen`, (p, p)."""
    k, rows, columns = eigen.eigenvalues.shape
    eye = [torch.eye(n, dtype=torch.float64).expand(k, n, n) for n in (rows, columns)]
    return kronecker(*(given if given is not None else e for given, e in zip((eigen.left, eigen.right), eye)))  # noqa: B905


def dense(eigen: Any) -> Tensor:
    """F = U diag(L) U^T, (p, p)."""
    u = basis(eigen)
    return u @ eigen.eigenvalues.flatten().diag() @ u.T


def exact_log_evidence(features: Tensor, targets: Tensor, tau: float, noise_std: float) -> float:
    """log p(Y) of Y = X W^T + noise, W ~ N(0, I / tau): every column of Y is N(0, X X^T / tau + s^2 I)."""
    covariance = features @ features.T / tau + noise_std**2 * torch.eye(len(features), dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(torch.zeros(len(features), dtype=torch.float64), covariance)
    return float(density.log_prob(targets.T).sum())


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest entry, for entries cancel."""
    found, expected = found.detach(), expected.detach()
    scale = float(expected.abs().max())
    assert scale > 0 and math.isfinite(scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
