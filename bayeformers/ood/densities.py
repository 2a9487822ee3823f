r"""Distances of features from the training data, higher for the less familiar: what each keeps, and its formula.

With mean m and covariance T of all rows, and S the covariance about the class means m_c:

| method | score | source |
| --- | --- | --- |
| ``marginal_mahalanobis`` | (x - m)^T T^-1 (x - m); needs no labels | Ren et al. 2021, eq. 3 |
| ``mahalanobis`` | min_c (x - m_c)^T S^-1 (x - m_c) | Lee et al. 2018, eq. 2 |
| ``relative_mahalanobis`` | the second less the first | Ren et al. 2021, eq. 2 |
| ``gaussian`` | -log sum_c pi_c N(x; m_c, S_c), in nats | Mukhoti et al. 2021 (DDU), eq. 3 |
| ``knn`` | distance to the k-th nearest of a sample of training rows, of x / abs(x) | Sun et al. 2022, eq. 1 |

Without classes the second is the first, and there is no third. A density is a mapping of named tensors, so that it is
saved as it is; covariances are shrunk as in `moments`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from .moments import Moments, deviations, whitener

DensityMethod = Literal["marginal_mahalanobis", "mahalanobis", "relative_mahalanobis", "gaussian", "knn"]
DENSITIES: tuple[str, ...] = get_args(DensityMethod)
Tensors = Mapping[str, Tensor]

_MOST_NUMBERS = 2**28
"""Of the covariances of all classes together: 2 GiB in float64."""


def check_gaussian_size(num_classes: int, size: int) -> None:
    """Raise ValueError where the covariances of all classes would take too much memory."""
    if num_classes * size**2 > _MOST_NUMBERS:
        raise ValueError(
            f"`method`='gaussian' needs a covariance of {size} x {size} for each of {num_classes} classes, more than "
            f"{_MOST_NUMBERS:,} numbers: take 'mahalanobis', whose classes share one."
        )


def from_moments(methods: Sequence[str], moments: Moments) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of Gaussian densities by method, in float64; classes without rows are left out.

    Args:
        methods: what is needed; methods share their tensors.
        moments: the sums.

    Raises:
        ValueError: fewer than two rows, or classes to compare, or the features are constant or not finite.
    """
    if float(moments.counts.sum()) < 2:
        raise ValueError(
            f"A density needs at least 2 rows, of a classifier with labels other than -100, got "
            f"{int(moments.counts.sum())}."
        )
    seen, total = moments.counts > 0, moments.total()
    if "relative_mahalanobis" in methods and int(seen.sum()) < 2:
        raise ValueError(
            "'relative_mahalanobis' needs rows of at least 2 classes, got those of one: take 'marginal_mahalanobis'."
        )
    scale = deviations(total[0])
    found: dict[str, dict[str, Tensor]] = {}
    if set(methods) & {"marginal_mahalanobis", "relative_mahalanobis"}:
        found["marginal_mahalanobis"] = {"means": moments.mean[None], "whitener": whitener(*total, scale)}
    if set(methods) <= {"marginal_mahalanobis", "energy"}:
        return found
    within, freedom = moments.within()
    if freedom < 1:
        raise ValueError("A density needs a class with at least 2 rows, but every row has a class of its own.")
    if "gaussian" in methods:
        own = [moments.of_class(label) for label in seen.nonzero().flatten().tolist()]
        # a class of one row has no spread of its own: it takes the shared one
        whiteners = [whitener(*(pair if _has_spread(*pair) else (within, freedom)), scale) for pair in own]
        log_weights = (moments.counts[seen] / moments.counts.sum()).log()
        means = moments.means[seen]
        found["gaussian"] = {"means": means, "whiteners": torch.stack(whiteners), "log_weights": log_weights}
        return found
    classes = {"means": moments.means[seen], "whitener": whitener(within, freedom, scale)}
    if "relative_mahalanobis" in methods:
        marginal = found["marginal_mahalanobis"]
        found["relative_mahalanobis"] = {**classes, "mean": marginal["means"], "background": marginal["whitener"]}
    return found | {"mahalanobis": classes}


def distance(method: str, features: Tensor, tensors: Tensors, known: dict[int, Tensor] | None = None) -> Tensor:
    """Return the score of the table above, (B,), in the dtype of the tensors.

    Args:
        method: one of `DENSITIES`.
        features: (B, D).
        tensors: as `from_moments` gave them; of "knn" ``references`` (M, D) of length 1 and ``neighbours`` k.
        known: distances to the marginal's mean that other methods on the same features share, filled by these.
    """
    features = features.to(tensors["references" if method == "knn" else "means"])
    if method == "knn":
        return _neighbour_distance(features, tensors["references"], int(tensors["neighbours"]))
    if method == "gaussian":
        return _negative_log_density(features, tensors)
    known = {} if known is None else known
    if method == "marginal_mahalanobis":
        return _marginal(features, tensors["means"], tensors["whitener"], known)
    nearest = _squared_distances(features, tensors["means"], tensors["whitener"]).amin(1)
    if method == "mahalanobis":
        return nearest
    return nearest - _marginal(features, tensors["mean"], tensors["background"], known)


def unit(features: Tensor) -> Tensor:
    """Features divided by their length, (B, D)."""
    lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    found: Tensor = features / lengths.clamp_min(torch.finfo(features.dtype).tiny)
    return found


def _marginal(features: Tensor, mean: Tensor, whitening: Tensor, known: dict[int, Tensor]) -> Tensor:
    if id(whitening) not in known:
        known[id(whitening)] = ((features - mean) @ whitening.mT).square().sum(1)
    return known[id(whitening)]


def _has_spread(covariance: Tensor, freedom: float) -> bool:
    return freedom >= 1 and bool(covariance.trace() > 0)


def _squared_distances(features: Tensor, means: Tensor, whitening: Tensor) -> Tensor:
    """To every mean, (B, C)."""
    centre = means.mean(0)  # subtracted first: the squares of what is left do not cancel
    rows, points = (features - centre) @ whitening.mT, (means - centre) @ whitening.mT
    squares = rows.square().sum(1, keepdim=True) + points.square().sum(1) - 2 * rows @ points.mT
    return squares.clamp_min(0)


def _negative_log_density(features: Tensor, tensors: Tensors) -> Tensor:
    logs = []
    for mean, whitening, log_weight in zip(
        *(tensors[name] for name in ("means", "whiteners", "log_weights")), strict=True
    ):
        log_det = whitening.diagonal().log().sum()  # of W, lower triangular: half that of the precision
        square = ((features - mean) @ whitening.mT).square().sum(1)
        logs.append(log_weight + log_det - 0.5 * (square + features.shape[1] * math.log(2 * math.pi)))
    return -torch.stack(logs, dim=1).logsumexp(1)


def _neighbour_distance(features: Tensor, references: Tensor, neighbours: int) -> Tensor:
    squares = (2 - 2 * unit(features) @ references.mT).clamp_min(0)
    return squares.kthvalue(neighbours, dim=1).values.sqrt()
