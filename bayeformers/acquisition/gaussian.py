r"""The same scores of a regression, in closed form: y = f_s(x) + noise, with the draws' f taken as jointly Gaussian.

``values`` f_s are (S, N), of one output; ``noise_variance`` is sigma^2 of each row, (N,). Everything is in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["gaussian_bald", "gaussian_batchbald", "gaussian_entropy", "gaussian_epig"]


def gaussian_entropy(values: Tensor, noise_variance: Tensor) -> Tensor:
    """Return the differential entropy 1/2 log(2 pi e (Var_s f_s + sigma^2)), (N,): it may be negative."""
    total = values.double().var(0, correction=0) + noise_variance.double()
    return 0.5 * (2 * math.pi * math.e * total).log()


def gaussian_bald(values: Tensor, noise_variance: Tensor) -> Tensor:
    """Return I(y; f) = 1/2 log(1 + Var_s f_s / sigma^2), (N,). Houlsby et al. 2011 (arXiv 1112.5745).

    >>> gaussian_bald(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.ones(2))
    tensor([0.3466, 0.0000], dtype=torch.float64)
    """
    return 0.5 * torch.log1p(values.double().var(0, correction=0) / noise_variance.double())


def gaussian_epig(
    values: Tensor, noise_variance: Tensor, target_values: Tensor, target_noise_variance: Tensor
) -> Tensor:
    """Return mean_t -1/2 log(1 - rho_t^2), rho_t the correlation of y and y_t, (N,).

    Bickford Smith et al. 2023 (arXiv 2304.08151), the Gaussian case of eq. 6.

    Args:
        values: of the rows, (S, N).
        noise_variance: of the rows, (N,).
        target_values: of the targets under the same draws, (S, T).
        target_noise_variance: of the targets, (T,).
    """
    rows, targets = _centred(values), _centred(target_values)
    covariance = rows.T @ targets  # (N, T)
    variances = rows.square().sum(0) + noise_variance.double()
    of_targets = targets.square().sum(0) + target_noise_variance.double()
    return -0.5 * torch.log1p(-covariance.square() / (variances[:, None] * of_targets)).mean(1)


def gaussian_batchbald(values: Tensor, noise_variance: Tensor, n: int) -> tuple[list[int], Tensor]:
    """Choose ``n`` rows greedily by I(y_1 .. y_n; f) = 1/2 log det(1 + K / sigma^2), K the covariance of f.

    Args:
        values: (S, N).
        noise_variance: (N,).
        n: how many rows, 1 .. N.

    Returns:
        The rows in the order of choice, and the gain of each, (n,).
    """
    scaled = _centred(values) / noise_variance.double().sqrt()
    inverse = torch.eye(len(scaled), dtype=torch.float64)  # of 1 + sum of a a^T over the chosen rows' a
    left, chosen, gains = torch.ones(scaled.shape[1], dtype=torch.bool), list[int](), list[float]()
    for _ in range(n):
        solved = inverse @ scaled
        quadratic = (scaled * solved).sum(0).clamp_min(0)
        best = int(quadratic.masked_fill(~left, -1).argmax())
        gains.append(0.5 * math.log1p(float(quadratic[best])))
        inverse = inverse - torch.outer(solved[:, best], solved[:, best]) / (1 + quadratic[best])  # Sherman-Morrison
        left[best] = False
        chosen.append(best)
    return chosen, torch.tensor(gains, dtype=torch.float64)


def _centred(values: Tensor) -> Tensor:
    """(f_s - mean) / sqrt(S), in float64: products over draws are covariances."""
    wide = values.double()
    return (wide - wide.mean(0)) / math.sqrt(len(wide))
