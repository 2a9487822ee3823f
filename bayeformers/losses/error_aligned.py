r"""Error-aligned uncertainty: the regression twins of AvUC.

With e >= 0 an item's error, tau_e and tau_u thresholds, an item is right if e <= tau_e. The soft counts of
:mod:`~bayeformers.losses.alignment` have a = 1 - tanh(e), and k = 1 - tanh(u) of an uncertainty u >= 0
(:func:`eau_loss`), or k = c of a confidence c in [0, 1] (:func:`eac_loss`):

| | certain | uncertain |
| --- | --- | --- |
| low error | n_LC = sum (1 - tanh e) k | n_LU = sum (1 - tanh e)(1 - k) |
| high error | n_HC = sum tanh(e) k | n_HU = sum tanh(e) (1 - k) |

    loss = log(1 + (n_LU + n_HC + eps) / (n_LC + n_HU + eps))

tanh saturates beyond 2: give errors and uncertainties in a unit in which typical ones are near 1, for example divided
by tau_e. After Kose, Krishnan et al. 2022, doi 10.1007/978-3-031-25072-9_31 (error aligned uncertainty optimization).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward import wide
from .alignment import EPS, alignment_loss, alignment_sums, check_eps, check_threshold

__all__ = ["eac_loss", "eau_loss"]


def eau_loss(
    error: Tensor,
    uncertainty: Tensor,
    error_threshold: float | Tensor,
    uncertainty_threshold: float | Tensor,
    *,
    eps: float = EPS,
) -> Tensor:
    """EaU, a scalar >= 0: errors against uncertainties.

    Args:
        error: e >= 0, of any shape, for example abs(y - mean).
        uncertainty: u >= 0, of the same shape, for example the predictive standard deviation in the same unit.
        error_threshold: tau_e; a low error is e <= tau_e.
        uncertainty_threshold: tau_u; certain is u <= tau_u.
        eps: > 0, added to both sums.

    Returns:
        The loss; a TypeError or ValueError names an argument of another type, shape or range.

    >>> error, aligned, misaligned = torch.tensor([[0.1, 0.2, 2.0], [0.1, 0.1, 3.0], [3.0, 0.1, 0.1]])
    >>> eau_loss(error, aligned, 1.0, 1.0), eau_loss(error, misaligned, 1.0, 1.0)
    (tensor(0.0040), tensor(1.2300))
    """
    spread = _checked(error, uncertainty, "uncertainty")
    check_threshold("uncertainty_threshold", uncertainty_threshold)
    return _loss(error, spread <= uncertainty_threshold, 1 - spread.tanh(), error_threshold, eps)


def eac_loss(
    error: Tensor,
    confidence: Tensor,
    error_threshold: float | Tensor,
    confidence_threshold: float | Tensor,
    *,
    eps: float = EPS,
) -> Tensor:
    """Return EaC, a scalar >= 0: errors against confidences.

    What is refused is as for :func:`eau_loss`.

    Args:
        error: e >= 0, of any shape, for example abs(y - mean).
        confidence: c in [0, 1], of the same shape, for example the predictive's own probability of an error <= tau_e.
        error_threshold: tau_e, in the errors' unit; a low error is e <= tau_e.
        confidence_threshold: certain is c >= this.
        eps: > 0, added to both sums.

    Raises:
        ValueError: a confidence is above 1.

    >>> error, aligned, misaligned = torch.tensor([[0.1, 0.2, 2.0], [0.9, 0.9, 0.1], [0.1, 0.9, 0.9]])
    >>> eac_loss(error, aligned, 1.0, 0.5), eac_loss(error, misaligned, 1.0, 0.5)
    (tensor(0.0041), tensor(1.1954))
    """
    certainty = _checked(error, confidence, "confidence")
    check_threshold("confidence_threshold", confidence_threshold)
    if bool((certainty > 1).any()):
        raise ValueError(f"`confidence` must lie in [0, 1], got {float(certainty.max())}.")
    return _loss(error, certainty >= confidence_threshold, certainty, error_threshold, eps)


def _loss(error: Tensor, is_certain: Tensor, certainty: Tensor, error_threshold: float | Tensor, eps: float) -> Tensor:
    check_eps(eps)
    check_threshold("error_threshold", error_threshold)
    errors = wide(error).flatten()
    sums = alignment_sums(errors <= error_threshold, is_certain, 1 - errors.tanh(), certainty)
    return alignment_loss(*sums, eps)


def _checked(error: Tensor, other: Tensor, name: str) -> Tensor:
    """``other``, flat, in float32 or wider."""
    for label, value in (("error", error), (name, other)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"`{label}` must be a floating-point tensor, got {getattr(value, 'dtype', type(value))}.")
        if not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise ValueError(f"`{label}` must be finite and >= 0 everywhere.")
    if error.shape != other.shape:
        raise ValueError(f"`{name}` must have the shape {tuple(error.shape)} of `error`, got {tuple(other.shape)}.")
    return wide(other).flatten()
