r"""Square roots of the Hessian of -log p(y | f) in the logits f, its gradients, its value.

The generalised Gauss-Newton matrix is sum_n J_n^T H_n J_n with H_n the expected Hessian of one item's negative
log-likelihood in its logits. With H = sum_k S_k S_k^T, the columns S_k are what is backpropagated from the logits,
never a model's own loss, whose scaling differs from head to head (means over tokens, label smoothing, a missing 1/2).

| likelihood | H | p(y given f) |
| --- | --- | --- |
| classification | diag(p) - p p^T, p = softmax(f) | Categorical(p) |
| multilabel | diag(p (1 - p)), p = sigmoid(f) | independent Bernoulli(p) |
| regression | I: noise 1, a noise s scales it by 1/s^2 | Normal(f, s^2 I) |
| ordinal | J^T (diag(p) - p p^T) J, J = d log p / d f | differences of cumulative logits, see `ordinal` |

Three ways to weigh the columns: `exact` (H itself), `mc` (E = H, with labels drawn from the model: the Fisher matrix),
`empirical` (the given labels' gradients, whose second moment is not H: it vanishes where the model fits perfectly).
Kunstner et al. 2019 (arXiv 1905.12558); Daxberger et al. 2021 (arXiv 2106.14806), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ..checks import is_finite, is_whole
from .base import Generators
from .base import Likelihood as _Likelihood
from .outputs import wide
from .registry import likelihood_of_family

__all__ = [
    "Fisher",
    "Likelihood",
    "empirical_column",
    "hessian_columns",
    "label_mask",
    "log_likelihood",
    "num_columns",
    "sampled_columns",
]

Likelihood = str
"""The name of a family: see `registry.families`."""
Fisher = Literal["exact", "mc", "empirical"]


def num_columns(num_outputs: int, likelihood: Likelihood) -> int:
    """How many columns :func:`hessian_columns` gives, the rank of H: C - 1 for classes, else C.

    >>> num_columns(2, "classification"), num_columns(2, "multilabel")
    (1, 2)
    """
    return _of_outputs(num_outputs, likelihood).num_columns(num_outputs)


def hessian_columns(logits: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    r"""Tensors S_k of the logits' shape with sum_k S_k S_k^T = H for every item; regression at noise 1.

    Args:
        logits: (..., C), detached here. A logit of -inf is a class that cannot occur.
        likelihood: of the labels given the logits.

    Returns:
        An iterator over the columns, computed one at a time, in at least float32 and given in the logits' dtype.
        They know no labels: multiply by :func:`label_mask` where some are ignored.

    Raises:
        ValueError: an unknown likelihood, logits that are no (..., C) of at least two classes, NaN or +inf.

    >>> (column,) = hessian_columns(torch.tensor([[0.0, 0.0]]), "classification")
    >>> column
    tensor([[ 0.5000, -0.5000]])
    """
    of, values = _checked(logits, likelihood)
    return (column.to(logits.dtype) for column in of.loss_hessian_sqrt(values))


def sampled_columns(
    logits: Tensor, likelihood: Likelihood, *, num_samples: int, generator: Generators
) -> Iterator[Tensor]:
    r"""Monte-Carlo columns S_m with E[sum_m S_m S_m^T] = H for every item, drawn independently per item (token).

    S_m is the gradient of -log p(yhat | f) / sqrt(M) for a label yhat that the model draws: its covariance is the
    Fisher matrix, that is, H.

    Args:
        logits: (..., C), as for :func:`hessian_columns`.
        likelihood: of the labels given the logits.
        num_samples: M >= 1, the number of columns.
        generator: of the CPU; draws are made there and moved, so they are the same for every device. Or one for each
            of the first axis.

    Raises:
        ValueError: as for :func:`hessian_columns`, fewer than one sample, or a generator of another device.

    >>> generator = torch.Generator().manual_seed(0)
    >>> (column,) = sampled_columns(torch.tensor([[0.0, 0.0]]), "classification", num_samples=1, generator=generator)
    >>> column.abs()
    tensor([[0.5000, 0.5000]])
    """
    of, values = _checked(logits, likelihood)
    if not is_whole(num_samples) or num_samples < 1:
        raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}.")
    for one in [generator] if isinstance(generator, torch.Generator) else generator:
        if one.device.type != "cpu":
            raise ValueError(f"`generator` must be of the CPU, so that draws agree on all devices, got {one.device}.")
    scale = math.sqrt(num_samples)
    return (of.sampled_gradient(values, generator).div_(scale).to(logits.dtype) for _ in range(num_samples))


def empirical_column(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """The gradient of -log p(labels | logits) in the logits: p - e_y, p - y, or f - y at noise 1; 0 where ignored.

    Args:
        logits: (..., C).
        labels: see :func:`log_likelihood`.
        likelihood: of the labels given the logits.

    Raises:
        ValueError: see :func:`log_likelihood`.

    >>> empirical_column(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), "classification")
    tensor([[ 0.5000, -0.5000]])
    """
    of, values = _checked(logits, likelihood)
    return of.gradient(values, of.check_labels(values, labels)).to(logits.dtype)


def log_likelihood(logits: Tensor, labels: Tensor, likelihood: Likelihood, noise_std: float = 1.0) -> Tensor:
    r"""log p(labels | logits), in nats, summed over all that is not ignored: a float64 scalar on the CPU.

    Args:
        logits: (..., C).
        labels: classes: integers (...) or (..., 1) in [0, C), or -100, which ignores the item. Multilabel:
            (..., C) in [0, 1], or -100, which ignores that one label. Regression: (..., C), or (...) if C = 1, any
            finite numbers: -100 is a value like others there.
        likelihood: of the labels given the logits.
        noise_std: s > 0, of a regression, whose constant -log(s) - log(2 pi) / 2 per number is included.

    Raises:
        ValueError: labels of another shape or outside the range, logits as for :func:`hessian_columns`, ``noise_std``
            that is not finite and > 0.

    >>> log_likelihood(torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([1, -100]), "classification")
    tensor(-0.6931, dtype=torch.float64)
    """
    of, values = _checked(logits, likelihood)
    labels = of.check_labels(values, labels)
    if not (is_finite(noise_std) and noise_std > 0):
        raise ValueError(f"`noise_std` must be finite and > 0, got {noise_std!r}.")
    return -of.losses(values, labels, noise_std).cpu().double().sum()


def label_mask(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """True where a logit enters the likelihood of these labels; (..., 1) for classes, else (..., C).

    Raises:
        ValueError: see :func:`log_likelihood`.

    >>> label_mask(torch.zeros(2, 3), torch.tensor([1, -100]), "classification")
    tensor([[ True],
            [False]])
    """
    of, values = _checked(logits, likelihood)
    return of.label_mask(of.check_labels(values, labels))


def _of_outputs(num_outputs: int, family: str) -> _Likelihood:
    likelihood = likelihood_of_family(family)
    if num_outputs < likelihood.min_outputs:
        remedy = "; one sigmoid logit is `multilabel`" if likelihood.min_outputs > 1 else ""
        raise ValueError(f"A {family} needs at least {likelihood.min_outputs} output(s), got {num_outputs}{remedy}.")
    return likelihood


def _checked(logits: Tensor, family: str) -> tuple[_Likelihood, Tensor]:
    """The likelihood, and the logits without gradient, in at least float32."""
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ValueError(f"`logits` must be floating point (..., C), got {logits.dtype} {tuple(logits.shape)}.")
    likelihood, values = _of_outputs(logits.shape[-1], family), wide(logits.detach())
    numbers, wrong = likelihood.diverged(values)
    if bool(wrong.any()):
        raise ValueError(f"`logits` must be finite, got {numbers[wrong][0].item()}: the model diverged or overflowed.")
    return likelihood, values
