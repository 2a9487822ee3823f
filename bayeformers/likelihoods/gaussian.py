r"""Regression: y ~ N(f, s^2), of one noise s for all inputs, or of a variance head, which predicts its own noise.

For L targets such a head has 2 L outputs: the first L columns are the means m, the last L the log variances v of
N(m, exp(v)). v is clamped to ``LOG_VARIANCE_RANGE``, i.e. a standard deviation between 4.5e-5 and 2.2e4 in the targets'
unit (standardise targets that are far from 1); outside of it its gradient is 0. Nix & Weigend 1994; Kendall & Gal
2017, arXiv 1703.04977.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, is_finite
from ..forward import labels_of, logits_of, wide
from .base import Batch, ItemNLL, Likelihood
from .loss_hessian import Generators, made

__all__ = ["HEAD", "LOG_VARIANCE_RANGE", "NoiseStd", "Regression", "check_noise_std", "gaussian_log_prob",
           "gaussian_nll", "mean_and_variance", "regression_labels", "regression_values", "split_variance_head",
           "squeezed", "unit_columns"]  # fmt: skip

LOG_VARIANCE_RANGE = (-20.0, 20.0)

HEAD: Literal["head"] = "head"
NoiseStd = float | Literal["head"]
"""A standard deviation > 0 in the targets' unit, or "head": the model predicts L means, then L log variances."""


def check_noise_std(noise_std: Any) -> NoiseStd | None:
    """Check a noise.

    Returns:
        ``noise_std`` as a float, "head" or None.

    Raises:
        ValueError: it is none of these.
    """
    if noise_std is None or (isinstance(noise_std, str) and noise_std == HEAD):
        return cast("NoiseStd | None", noise_std)
    if not (is_finite(noise_std) and noise_std > 0):
        raise ValueError(f'`noise_std` must be finite and > 0, or "head", got {noise_std!r}.')
    return float(noise_std)


def gaussian_log_prob(value: Tensor, mean: Tensor, log_scale: Tensor | float) -> Tensor:
    """Return log N(value; mean, exp(log_scale)^2) in nats, elementwise; the arguments broadcast.

    Args:
        value: the point y, in the targets' unit.
        mean: the mean, in the same unit.
        log_scale: the log of the standard deviation in that unit.
    """
    inverse = math.exp(-log_scale) if isinstance(log_scale, float) else (-log_scale).exp()
    return -(0.5 * ((value - mean) * inverse).square() + log_scale + 0.5 * math.log(2 * math.pi))


def split_variance_head(output: Tensor) -> tuple[Tensor, Tensor]:
    """Split the output (..., 2 L) of a variance head.

    Returns:
        Means and clamped log variances, (..., L) each, in float32 or wider.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: an odd number of columns.

    >>> split_variance_head(torch.tensor([[1.0, 2.0, 0.0, 50.0]]))
    (tensor([[1., 2.]]), tensor([[ 0., 20.]]))
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(f"`output` must be a floating-point tensor, got {getattr(output, 'dtype', type(output))}.")
    if output.dim() == 0 or output.shape[-1] == 0 or output.shape[-1] % 2:
        raise ValueError(
            "`output` of a variance head must have 2 L columns, L means and then L log variances, got shape "
            f"{tuple(output.shape)}: set `num_labels` to twice the number of targets."
        )
    mean, log_variance = wide(output).chunk(2, dim=-1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def gaussian_nll(output: Tensor, target: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    r"""-log N(y; m, exp(v)) = (y - m)^2 exp(-v) / 2 + v / 2 + log(2 pi) / 2, summed over an example's L targets.

    Args:
        output: (B, 2 L): m, then v.
        target: y, (B, L); (B,) for L = 1.
        reduction: over examples: "mean", "sum" or "none".

    Returns:
        A scalar, or (B,) for "none".

    Raises:
        TypeError: an argument is no tensor.
        ValueError: an argument of another shape or range.

    >>> gaussian_nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))  # log(2 pi) / 2
    tensor(0.9189)
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    mean, log_variance = split_variance_head(output)
    if mean.dim() != 2:
        raise ValueError(f"`output` must have shape (B, 2 L), got {tuple(output.shape)}.")
    if not isinstance(target, Tensor):
        raise TypeError(f"`target` must be a tensor, got {type(target).__name__}.")
    if target.shape != mean.shape and (mean.shape[1] > 1 or target.shape != mean.shape[:1]):
        raise ValueError(f"`target` must have shape {tuple(mean.shape)}, got {tuple(target.shape)}.")
    target = target.to(mean).reshape(mean.shape)
    if not bool(target.isfinite().all()):
        raise ValueError("`target` must be finite.")
    values = -gaussian_log_prob(target, mean, 0.5 * log_variance).sum(1)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def mean_and_variance(output: Tensor) -> tuple[Tensor, Tensor]:
    """Read the output (..., 2 L) of a variance head; `split_variance_head` says what is refused.

    Returns:
        Means and noise variances, (..., L) each, or (...) for L = 1.

    >>> mean_and_variance(torch.tensor([[1.5, 0.0]]))
    (tensor([1.5000]), tensor([1.]))
    """
    mean, log_variance = split_variance_head(output)
    return squeezed(mean), squeezed(log_variance.exp())


def squeezed(values: Tensor) -> Tensor:
    """(..., L) -> (...) for L = 1, as regression values are kept."""
    return values.squeeze(-1) if values.dim() > 1 and values.shape[-1] == 1 else values


def regression_values(output: Any, noise_std: NoiseStd | None) -> tuple[Tensor, Tensor]:
    """Read one draw of a regression.

    Returns:
        Means and noise variances, (B,) or (B, L) each, in float32 or wider.

    Raises:
        ValueError: the noise is not known.

    >>> regression_values(torch.tensor([[1.5, 0.0]]), "head")
    (tensor([1.5000]), tensor([1.]))
    """
    values = logits_of(output)
    if noise_std is None:
        raise ValueError("`noise_std` is not known: give a number > 0, for example the RMSE on training data.")
    if noise_std == HEAD:
        return mean_and_variance(values)
    values = squeezed(values)
    return values, torch.full_like(values, noise_std**2)


def regression_labels(batch: Batch, mean: Tensor) -> Tensor:
    """Check a regression's labels against its ``mean``, (B,) or (B, L).

    Returns:
        The labels, (B, L), in the dtype of the mean.

    Raises:
        ValueError: labels of another number, or that are not finite.
    """
    labels = labels_of(batch).to(mean)
    if labels.numel() != mean.numel():
        raise ValueError(f"`labels` must have {mean.numel()} numbers, as the head's output, got {labels.numel()}.")
    if not bool(labels.isfinite().all()):
        raise ValueError("`labels` of a regression must be finite.")
    return labels.reshape(len(mean), -1)


def unit_columns(logits: Tensor) -> Iterator[Tensor]:
    """e_k for each of the C outputs, of the logits' shape."""
    for k in range(logits.shape[-1]):
        column = torch.zeros_like(logits)
        column[..., k] = 1.0
        yield column


class Regression(Likelihood):
    """Values (B, L) with Gaussian noise; Laplace's curvature is taken at noise 1, and a noise s scales it by 1/s^2."""

    problem_type = "regression"
    family = "regression"
    fits_sequences = True
    has_noise = True
    links = ("auto",)

    def nll(self, outputs: Any, batch: Batch, noise_std: Any = None) -> ItemNLL:
        """Return the Gaussian NLL of each example in nats, (B,), summed over its outputs.

        Args:
            outputs: what the model returned, with values (B, L), or (B, 2 L) of a variance head.
            batch: what its forward took, with labels (B, L).
            noise_std: s > 0 in the targets' unit, or "head" of a variance head.

        Raises:
            ValueError: ``noise_std`` is neither.
        """
        output = logits_of(outputs)
        if noise_std == HEAD:
            labels = regression_labels(batch, split_variance_head(output)[0])
            values = gaussian_nll(output.reshape(len(output), -1), labels, "none")
        elif not (is_finite(noise_std) and noise_std > 0):
            raise ValueError(f"`noise_std` must be a number > 0 for a Gaussian likelihood, got {noise_std!r}.")
        else:
            labels = regression_labels(batch, output)
            values = -gaussian_log_prob(labels, output.reshape(labels.shape), math.log(noise_std)).sum(1)
        return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))

    def mean_loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean squared error: a head's own loss knows no noise."""
        logits = outputs["logits"].float().squeeze()
        return F.mse_loss(logits, batch["labels"].to(logits).squeeze())

    def values(self, output: Any, batch: Any, *, is_stacked: bool = False) -> Tensor:
        """Return the outputs, (B,), or (B, L) of several; `mean_and_variance` splits those of a variance head.

        Args:
            output: what the model returned, with values (B, L).
            batch: what its forward took, which does not matter here.
            is_stacked: whether there is an axis S of draws before the others, which changes nothing here.
        """
        return squeezed(logits_of(output))

    # -- Laplace -----------------------------------------------------------------------------------------------------

    def _labels(self, values: Tensor, labels: Tensor) -> Tensor:
        """(..., C), or (...) if C = 1; -100 is a value like others."""
        if values.shape[-1] == 1 and labels.shape == values.shape[:-1]:
            labels = labels[..., None]
        if labels.shape != values.shape:
            raise ValueError(
                f"`labels` must have shape {tuple(values.shape)} for a regression, got {tuple(labels.shape)}."
            )
        labels = labels.to(values)
        if not bool(labels.isfinite().all()):
            raise ValueError(f"`labels` must be finite, got {labels[~labels.isfinite()][0].item()}.")
        return labels

    def _mask(self, labels: Tensor) -> Tensor:
        """Every value counts."""
        return torch.ones_like(labels, dtype=torch.bool)

    def _columns(self, values: Tensor) -> Iterator[Tensor]:
        """H = I at noise 1."""
        return unit_columns(values)

    def _gradient(self, values: Tensor, labels: Tensor) -> Tensor:
        """Of noise 1: f - y."""
        return values - labels

    def _sampled(self, values: Tensor, generator: Generators) -> Tensor:
        """Normal numbers z ~ N(0, I)."""
        return made(torch.randn, values.shape, generator, torch.float64).to(values)

    def _losses(self, values: Tensor, labels: Tensor, noise_std: float = 1.0) -> Tensor:
        """One per number, the constant included."""
        return -gaussian_log_prob(labels, values, math.log(noise_std))
