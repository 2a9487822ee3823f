"""Maps of probabilities that are fitted to held-out labels: vector scaling and Dirichlet calibration.

Of an example with log-probabilities x = log p, (C,), the calibrated probabilities are softmax(W x + b). Vector scaling
(Guo et al. 2017, arXiv 1706.04599) has a diagonal W, Dirichlet calibration (Kull et al. 2019, arXiv 1910.12656) a full
one. With temperature scaling, W = I / T and b = 0, these are three families, each within the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from ._checks import FloatArray, IntArray, choice, float_array, integer_labels
from .calibration import fit_temperature

__all__ = ["LOG_FLOOR", "LinearMap", "MapKind", "fit_linear_map"]

MapKind = Literal["vector", "dirichlet"]

LOG_FLOOR = -87.0
"""Log-probabilities below, such as that of an excluded class, are taken for this one: about float32's least."""

_GRID = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
_FOLDS = 5
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LinearMap:
    """``weight`` W, (C, C), ``bias`` b, (C,), and the ``penalty`` lambda that it was fitted with."""

    weight: FloatArray
    bias: FloatArray
    penalty: float


def fit_linear_map(
    log_probs: ArrayLike, labels: ArrayLike, kind: MapKind = "dirichlet", penalty: float | None = None
) -> LinearMap:
    r"""Return the W and b that minimise the held-out NLL of softmax(W x + b), with a penalty on what is not scaling.

    The objective, mean_i -log p_i(y_i) + lambda (sum_{k != l} W_kl^2 / (C (C - 1)) + sum_k b_k^2 / C), is convex; Kull
    et al. call the penalty ODIR (off-diagonal and intercept regularisation). The diagonal is free.

    Args:
        log_probs: log-probabilities of the averaged prediction, (N, C) with C >= 2.
        labels: integer classes, (N,).
        kind: "vector" for a diagonal W, or "dirichlet" for a full one.
        penalty: lambda >= 0; None: that of 0.001, 0.01, ..., 100 with the least NLL in five-fold cross-validation.

    Raises:
        ValueError: other shapes, another kind, a negative penalty, or fewer than 10 rows to cross-validate on.

    >>> x = np.log([[0.9, 0.1]] * 4 + [[0.2, 0.8]] * 5)  # 3 of 4 are of class 0, and 1 of 5
    >>> found = fit_linear_map(x, [0, 0, 0, 1, 0, 1, 1, 1, 1], "vector", penalty=0)
    >>> y = x @ found.weight.T + found.bias
    >>> (np.exp(y) / np.exp(y).sum(1, keepdims=True))[[0, 4], 0].round(3)
    array([0.75, 0.2 ])
    """
    choice(kind, get_args(MapKind), "kind")
    values = float_array(np.maximum(np.asarray(log_probs, dtype=float), LOG_FLOOR), "log_probs", ndim=2)
    if values.shape[1] < 2:
        raise ValueError(f"`log_probs` needs a column per class and at least 2, got shape {values.shape}.")
    classes = integer_labels(labels, *values.shape)
    if penalty is None:
        penalty = _chosen(values, classes, kind)
    elif isinstance(penalty, bool) or not np.isfinite(penalty) or penalty < 0:
        raise ValueError(f"`penalty` must be a finite number >= 0, got {penalty!r}.")
    return _fitted(values, classes, kind, float(penalty))


def _chosen(values: FloatArray, classes: IntArray, kind: MapKind) -> float:
    """By cross-validation: each row is held out once."""
    if len(values) < 2 * _FOLDS:
        raise ValueError(f"`penalty` needs {2 * _FOLDS} rows to be chosen on, got {len(values)}: give a number.")
    fold = np.random.default_rng(0).permutation(len(values)) % _FOLDS

    def loss(penalty: float) -> float:
        total = 0.0
        for held in range(_FOLDS):
            inside = fold != held
            found = _fitted(values[inside], classes[inside], kind, penalty, tolerance=1e-8)
            logits = values[~inside] @ found.weight.T + found.bias
            total -= float(_log_softmax(logits)[np.arange(len(logits)), classes[~inside]].sum())
        return total

    return min(_GRID, key=loss)


def _fitted(
    values: FloatArray, classes: IntArray, kind: MapKind, penalty: float, tolerance: float = 1e-12
) -> LinearMap:
    from scipy.optimize import minimize  # here: importing scipy.optimize takes longer than most uses of this module

    count = values.shape[1]
    start = np.eye(count) / fit_temperature(values, classes)  # the best of the family within
    free = np.eye(count, dtype=bool) if kind == "vector" else np.ones((count, count), dtype=bool)
    one_hot = np.eye(count)[classes]
    off_diagonal, per_weight = ~np.eye(count, dtype=bool), penalty / (count * (count - 1))

    def objective(flat: FloatArray) -> tuple[float, FloatArray]:
        weight, bias = np.zeros((count, count)), flat[-count:]
        weight[free] = flat[:-count]
        log_probs = _log_softmax(values @ weight.T + bias)
        residual = (np.exp(log_probs) - one_hot) / len(values)
        loss = -(one_hot * log_probs).sum() / len(values)
        loss += per_weight * np.square(weight[off_diagonal]).sum() + penalty / count * np.square(bias).sum()
        of_weight = residual.T @ values + 2 * per_weight * weight * off_diagonal
        of_bias = residual.sum(0) + 2 * penalty / count * bias
        return float(loss), np.concatenate([of_weight[free], of_bias])

    first = np.concatenate([start[free], np.zeros(count)])
    options = {"maxiter": _MAX_ITERATIONS, "ftol": tolerance, "gtol": 1e-8, "maxcor": 30}
    found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options).x
    weight = np.zeros((count, count))
    weight[free] = found[:-count]
    return LinearMap(weight=weight, bias=found[-count:].copy(), penalty=penalty)


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result
