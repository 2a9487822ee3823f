"""Uncertainty of Monte-Carlo predictions, over `bayeformers.metrics`; NumPy, draws first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .... import metrics
from ....distributions import initial_scale, rho_from_scale
from ...checks import check_positive
from ...deprecation import deprecated

FloatArray = NDArray[np.float64]


def predictive_entropy(mc_preds: ArrayLike) -> FloatArray:
    """Return the total uncertainty H[mean_s p_s] in nats. Now: `bayeformers.metrics.predictive_entropy(log_probs)`.

    Args:
        mc_preds: probabilities (S draws, ..., C classes); neither logits nor their logarithm.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: no array of probabilities.

    Shape: (S, ..., C) -> (...).

    >>> predictive_entropy([[[0.9, 0.1]], [[0.1, 0.9]]]).round(4)
    array([0.6931])
    """
    deprecated("bayesian_torch.utils.util.predictive_entropy", "`bayeformers.metrics.predictive_entropy(log_probs)`")
    return _of_probabilities(metrics.predictive_entropy, mc_preds)


def mutual_information(mc_preds: ArrayLike) -> FloatArray:
    """Return the epistemic part H[mean_s p_s] - mean_s H[p_s] in nats. Now: `bayeformers.metrics.mutual_information`.

    Arguments, shapes and errors as of :func:`predictive_entropy`.

    >>> mutual_information([[[0.9, 0.1]], [[0.1, 0.9]]]).round(4)
    array([0.3681])
    """
    deprecated("bayesian_torch.utils.util.mutual_information", "`bayeformers.metrics.mutual_information(log_probs)`")
    return _of_probabilities(metrics.mutual_information, mc_preds)


def get_rho(sigma: Tensor, delta: float) -> Tensor:
    """Return MOPED's initial rho, of scale delta |w| for a weight ``sigma`` = w. Now: `to_bayesian(model, delta)`.

    Zeros get a share of the mean weight of their tensor instead of a scale of 1e-20.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: ``delta`` is no finite number > 0; ``sigma`` no tensor.

    Shape: any -> the same.
    """
    deprecated("bayesian_torch.utils.util.get_rho", "`bayeformers.to_bayesian(model, delta)`, which starts rho there")
    if not isinstance(sigma, Tensor):
        raise TypeError(f"`sigma` must be a tensor, the weight itself, got {type(sigma).__name__}.")
    return rho_from_scale(initial_scale(sigma, check_positive("delta", delta)))


def _of_probabilities(function: Callable[[Any], Any], mc_preds: ArrayLike) -> FloatArray:
    probs = np.asarray(mc_preds)
    if probs.dtype.kind != "f":
        raise TypeError(f"`mc_preds` must hold floating-point probabilities, got dtype {probs.dtype}.")
    if probs.ndim < 2:
        raise ValueError(f"`mc_preds` must have shape (S draws, ..., C classes), got {probs.shape}.")
    if not bool((probs >= 0).all()):  # NaN fails too
        raise ValueError("`mc_preds` must be probabilities >= 0; of logits take the softmax first.")
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs.astype(np.float64))
    values: FloatArray = function(log_probs if probs.ndim > 2 else log_probs[:, None])
    return values if probs.ndim > 2 else values[0]
