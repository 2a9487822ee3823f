r"""Likelihoods as functions of the logits f: square roots of the Hessian of -log p(y | f), its gradients, its value.

The generalised Gauss-Newton matrix is sum_n J_n^T H_n J_n with H_n the Hessian of one item's negative log-likelihood in
its logits. With H = sum_k S_k S_k^T, the columns S_k are what is backpropagated from the logits, never a model's own
loss, whose scaling differs from head to head (means over tokens, label smoothing, a missing 1/2).

| likelihood | H | p(y given f) |
| --- | --- | --- |
| classification | diag(p) - p p^T, p = softmax(f) | Categorical(p) |
| multilabel | diag(p (1 - p)), p = sigmoid(f) | independent Bernoulli(p) |
| regression | I: noise 1, a noise s scales it by 1/s^2 | Normal(f, s^2 I) |

Three ways to weigh the columns: `exact` (H itself), `mc` (E = H, with labels drawn from the model: the Fisher matrix),
`empirical` (the given labels' gradients, whose second moment is not H: it vanishes where the model fits perfectly).
Kunstner et al. 2019 (arXiv 1905.12558); Daxberger et al. 2021 (arXiv 2106.14806), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_whole
from ..likelihoods import IGNORED

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

Likelihood = Literal["classification", "regression", "multilabel"]
Fisher = Literal["exact", "mc", "empirical"]
Generators = torch.Generator | Sequence[torch.Generator]


def num_columns(num_outputs: int, likelihood: Likelihood) -> int:
    """How many columns :func:`hessian_columns` gives, the rank of H: C - 1 for classification, else C.

    >>> num_columns(2, "classification"), num_columns(2, "multilabel")
    (1, 2)
    """
    _check_outputs(num_outputs, likelihood)
    return num_outputs - 1 if likelihood == "classification" else num_outputs


def hessian_columns(logits: Tensor, likelihood: Likelihood) -> Iterator[Tensor]:
    r"""Tensors S_k of the logits' shape with sum_k S_k S_k^T = H for every item; regression at noise 1.

    Classification is the Cholesky factor of diag(p) - p p^T in closed form, C - 1 columns, so one backward pass fewer
    than sqrt(p_c) (e_c - p), c = 1..C. With the tail sums q_k = p_k + ... + p_C,

        S_k = sqrt(p_k q_{k+1} / q_k) (e_k - r_k),    r_k = p restricted to the classes after k, divided by q_{k+1}

    (Tanabe and Sagae 1992, J. R. Statist. Soc. B 54(1), 211-219). Computed from log-probabilities: nothing divides by a
    tail that has underflowed, and sqrt(p (1 - p)) keeps its relative precision where 1 - p would round to 0.
    Multilabel: sqrt(p_k (1 - p_k)) e_k. Regression: e_k.

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
    values = _check_logits(logits, likelihood)
    columns = {"classification": _softmax_columns, "multilabel": _sigmoid_columns, "regression": _unit_columns}
    return (column.to(logits.dtype) for column in columns[likelihood](values))


def sampled_columns(
    logits: Tensor, likelihood: Likelihood, *, num_samples: int, generator: Generators
) -> Iterator[Tensor]:
    r"""Monte-Carlo columns S_m with E[sum_m S_m S_m^T] = H for every item, drawn independently per item (token).

    S_m = (p - e_yhat) / sqrt(M) with yhat ~ Categorical(p); (p - yhat) / sqrt(M) with yhat ~ Bernoulli(p) per label; or
    z / sqrt(M) with z ~ N(0, I): the gradient of -log p(yhat | f), whose covariance is the Fisher matrix, that is, H.

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
    values = _check_logits(logits, likelihood)
    if not is_whole(num_samples) or num_samples < 1:
        raise ValueError(f"`num_samples` must be an integer >= 1, got {num_samples!r}.")
    for one in [generator] if isinstance(generator, torch.Generator) else generator:
        if one.device.type != "cpu":
            raise ValueError(f"`generator` must be of the CPU, so that draws agree on all devices, got {one.device}.")
    draw = {"classification": _draw_class, "multilabel": _draw_indicators, "regression": _draw_noise}[likelihood]
    mean = _mean(values, likelihood)
    return (draw(mean, generator).div_(math.sqrt(num_samples)).to(logits.dtype) for _ in range(num_samples))


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
    values = _check_logits(logits, likelihood)
    labels = _check_labels(values, labels, likelihood)
    mask = _mask(labels, likelihood)
    column = _mean(values, likelihood)
    if likelihood == "classification":
        column.scatter_add_(-1, labels.clamp_min(0)[..., None], column.new_tensor(-1.0).expand_as(mask))
    else:
        column -= labels
    return column.masked_fill_(~mask, 0.0).to(logits.dtype)


def log_likelihood(logits: Tensor, labels: Tensor, likelihood: Likelihood, noise_std: float = 1.0) -> Tensor:
    r"""log p(labels | logits), in nats, summed over all that is not ignored: a float64 scalar on the CPU.

    Args:
        logits: (..., C).
        labels: classification: integers (...) or (..., 1) in [0, C), or -100, which ignores the item. Multilabel:
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
    values = _check_logits(logits, likelihood)
    labels = _check_labels(values, labels, likelihood)
    if not (math.isfinite(noise_std) and noise_std > 0):
        raise ValueError(f"`noise_std` must be finite and > 0, got {noise_std!r}.")
    if likelihood == "classification":
        losses = F.cross_entropy(values.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    elif likelihood == "multilabel":
        losses = F.binary_cross_entropy_with_logits(values, labels, reduction="none")
        losses = losses.masked_fill_(~_mask(labels, likelihood), 0.0)
    else:
        residual = (labels - values) / noise_std
        losses = 0.5 * residual.square() + (math.log(noise_std) + 0.5 * math.log(2 * math.pi))
    return -losses.cpu().double().sum()


def label_mask(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """True where a logit enters the likelihood of these labels; (..., 1) for classification, else (..., C).

    Raises:
        ValueError: see :func:`log_likelihood`.

    >>> label_mask(torch.zeros(2, 3), torch.tensor([1, -100]), "classification")
    tensor([[ True],
            [False]])
    """
    values = _check_logits(logits, likelihood)
    return _mask(_check_labels(values, labels, likelihood), likelihood)


# ----------------------------------------------------------------------------------------------------- exact columns


def _softmax_columns(logits: Tensor) -> Iterator[Tensor]:
    # finite, so that differences of two impossible classes are no inf - inf; exp of a quarter of the minimum is still 0
    log_p = logits.log_softmax(-1).clamp_min(torch.finfo(logits.dtype).min / 4)
    log_tail = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    for k in range(logits.shape[-1] - 1):
        scale = (0.5 * (log_p[..., k] + log_tail[..., k + 1] - log_tail[..., k])).exp()
        column = torch.zeros_like(logits)
        column[..., k] = scale
        column[..., k + 1 :] = -scale[..., None] * (log_p[..., k + 1 :] - log_tail[..., k + 1, None]).exp()
        yield column


def _sigmoid_columns(logits: Tensor) -> Iterator[Tensor]:
    # sqrt(p (1 - p)) by logarithms: p = 1 - 1e-12 is 1 in float32
    scale = (0.5 * (F.logsigmoid(logits) + F.logsigmoid(-logits))).exp()
    for k in range(logits.shape[-1]):
        column = torch.zeros_like(logits)
        column[..., k] = scale[..., k]
        yield column


def _unit_columns(logits: Tensor) -> Iterator[Tensor]:
    for k in range(logits.shape[-1]):
        column = torch.zeros_like(logits)
        column[..., k] = 1.0
        yield column


# ----------------------------------------------------------------------------------------------------- sampled columns


def _draw_class(probs: Tensor, generator: Generators) -> Tensor:
    """p - e_yhat by the inverse of the distribution function: one uniform per item, not one number per class."""
    uniform = _uniform(probs[..., :1], generator)
    cumulative = probs.to(uniform.dtype).cumsum(-1)
    # `right`: the first class whose sum exceeds u * total < total; it has p > 0
    drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
    return probs.scatter_add(-1, drawn, probs.new_tensor(-1.0).expand(drawn.shape))


def _draw_indicators(probs: Tensor, generator: Generators) -> Tensor:
    uniform = _uniform(probs, generator)
    return probs - (uniform < probs.to(uniform.dtype)).to(probs)


def _uniform(like: Tensor, generator: Generators) -> Tensor:
    """U[0, 1) of one shape and device, in float64: float32 would draw outcomes rarer than 2^-24 too often or never."""
    dtype = torch.float32 if like.device.type == "mps" else torch.float64  # MPS has no float64
    return _made(torch.rand, like.shape, generator, dtype).to(like.device)


def _draw_noise(mean: Tensor, generator: Generators) -> Tensor:
    return _made(torch.randn, mean.shape, generator, torch.float64).to(mean)


def _made(draw: Callable[..., Tensor], shape: torch.Size, generator: Generators, dtype: torch.dtype) -> Tensor:
    if isinstance(generator, torch.Generator):
        return draw(shape, generator=generator, dtype=dtype)
    return torch.stack([draw(shape[1:], generator=one, dtype=dtype) for one in generator])


# -------------------------------------------------------------------------------------------------------------- checks


def _mean(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """E[y | f], of the logits' shape; a new tensor."""
    if likelihood == "classification":
        return logits.softmax(-1)
    return logits.sigmoid() if likelihood == "multilabel" else logits.clone()


def _mask(labels: Tensor, likelihood: Likelihood) -> Tensor:
    if likelihood == "regression":
        return torch.ones_like(labels, dtype=torch.bool)
    mask = labels != IGNORED
    return mask[..., None] if likelihood == "classification" else mask


def _check_outputs(num_outputs: int, likelihood: Likelihood) -> None:
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"`likelihood` must be one of {', '.join(get_args(Likelihood))}, got {likelihood!r}.")
    least = 2 if likelihood == "classification" else 1
    if num_outputs < least:
        remedy = "; one sigmoid logit is `multilabel`" if likelihood == "classification" else ""
        raise ValueError(f"A {likelihood} needs at least {least} output(s), got {num_outputs}{remedy}.")


def _check_logits(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """The logits without gradient, in at least float32."""
    if logits.dim() < 2 or not logits.is_floating_point():
        raise ValueError(f"`logits` must be floating point (..., C), got {logits.dtype} {tuple(logits.shape)}.")
    _check_outputs(logits.shape[-1], likelihood)
    values = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    # one number per item says enough: a maximum is NaN or +inf if any logit is, and -inf if no class can occur
    extremes = values if likelihood == "regression" else values.amax(-1)
    wrong = extremes.isnan() | extremes.isposinf() if likelihood == "multilabel" else ~extremes.isfinite()
    if bool(wrong.any()):
        raise ValueError(f"`logits` must be finite, got {extremes[wrong][0].item()}: the model diverged or overflowed.")
    return values


def _check_labels(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Labels on the logits' device: int64 (...) for classification, else of the logits' shape and dtype."""
    shape, of_classes = logits.shape, likelihood == "classification"
    column = labels.shape == (*shape[:-1], 1)
    if of_classes and column:
        labels = labels.squeeze(-1)
    elif likelihood == "regression" and shape[-1] == 1 and labels.shape == shape[:-1]:
        labels = labels[..., None]
    expected = shape[:-1] if of_classes else shape
    if labels.shape != expected:
        raise ValueError(f"`labels` must have shape {tuple(expected)} for {likelihood}, got {tuple(labels.shape)}.")
    if of_classes and labels.is_floating_point():
        raise ValueError(f"`labels` of a classification must be integers, got {labels.dtype}.")
    labels = labels.to(logits.device, torch.int64 if of_classes else logits.dtype)
    _check_range(labels, shape[-1], likelihood)
    return labels


def _check_range(labels: Tensor, num_classes: int, likelihood: Likelihood) -> None:
    if likelihood == "classification":
        allowed, wrong = f"in [0, {num_classes}) or {IGNORED}", (labels < 0) | (labels >= num_classes)
    elif likelihood == "multilabel":
        allowed, wrong = f"in [0, 1] or {IGNORED}", ~((labels >= 0) & (labels <= 1))
    else:
        allowed, wrong = "finite", ~labels.isfinite()
    if likelihood != "regression":
        wrong = wrong & (labels != IGNORED)
    if bool(wrong.any()):
        raise ValueError(f"`labels` of a {likelihood} must be {allowed}, got {labels[wrong][0].item()}.")
