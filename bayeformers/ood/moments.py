r"""Sums of features over the training data: counts, means and covariances by class, in float64, over all processes.

Covariances are shrunk by OAS (Chen et al. 2010, arXiv 0907.4698, eq. 23) after every feature is divided by its standard
deviation s: with R = the correlations, p features and n degrees of freedom, S = (1 - rho) R + rho (tr R / p) I with

    rho = min(1, ((1 - 2/p) tr R^2 + tr^2 R) / ((n + 1 - 2/p) (tr R^2 - tr^2 R / p)))

in closed form, whatever the features' scales, and positive definite with fewer rows than features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..processes import summed

_FLOOR = 1e-6
"""Of a feature's standard deviation, relative to the largest one."""


class Moments:
    """Running sums of features by class.

    >>> moments = Moments(num_classes=2)
    >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 0.0]]), torch.tensor([0, 0, 1]))
    >>> moments.means
    tensor([[1., 1.],
            [5., 0.]], dtype=torch.float64)

    Args:
        num_classes: C; 1 for features without classes.
        per_class: whether every class has second moments of its own, C D^2 numbers.
        origin: a point near the features, (D,), the same in all processes, which is subtracted before anything is
            squared, for squares of large features cancel; None: 0.
    """

    def __init__(self, num_classes: int, *, per_class: bool = False, origin: Tensor | None = None) -> None:
        self.num_classes, self.per_class, self.origin = num_classes, per_class, origin
        self.counts = self.sums = self.squares = torch.empty(0, dtype=torch.float64)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: ``features`` (B, D) and ``labels`` (B,) in 0..C-1."""
        features, labels = features.double(), labels.to(features.device)
        if self.counts.numel() == 0:
            self._start(features.shape[1], features.device)
        if self.origin is not None:
            features = features - self.origin.to(features)
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        self.sums.index_add_(0, labels, features)
        if not self.per_class:
            self.squares[0] += features.mT @ features
            return
        for label in torch.unique(labels).tolist():
            own = features[labels == label]
            self.squares[label] += own.mT @ own

    def all_reduce(self) -> None:
        """Sum over all processes, each of which has seen a batch."""
        self.counts, self.sums, self.squares = map(summed, (self.counts, self.sums, self.squares))

    @property
    def means(self) -> Tensor:
        """By class, (C, D); the origin of a class without a row."""
        return self._moved(self._means)

    @property
    def mean(self) -> Tensor:
        """Of all rows, (D,)."""
        return self._moved(self._mean)

    def within(self) -> tuple[Tensor, float]:
        """Return the covariance about the class means, (D, D), and its degrees of freedom N - (classes with rows)."""
        scatter = self.squares.sum(0) - self.sums.mT @ self._means
        freedom = float(self.counts.sum() - (self.counts > 0).sum())
        return scatter / max(freedom, 1.0), freedom

    def total(self) -> tuple[Tensor, float]:
        """Return the covariance about the mean of all rows, (D, D), and its degrees of freedom N - 1."""
        count = float(self.counts.sum())
        scatter = self.squares.sum(0) - count * torch.outer(self._mean, self._mean)
        return scatter / max(count - 1, 1.0), count - 1

    def of_class(self, label: int) -> tuple[Tensor, float]:
        """Return one class's own covariance, (D, D), and its degrees of freedom n_c - 1."""
        count, mean = float(self.counts[label]), self._means[label]
        scatter = self.squares[label] - count * torch.outer(mean, mean)
        return scatter / max(count - 1, 1.0), count - 1

    @property
    def _means(self) -> Tensor:
        return self.sums / self.counts.clamp_min(1)[:, None]

    @property
    def _mean(self) -> Tensor:
        return self.sums.sum(0) / self.counts.sum()

    def _moved(self, mean: Tensor) -> Tensor:
        return mean if self.origin is None else mean + self.origin.to(mean)

    def _start(self, size: int, device: torch.device) -> None:
        shape = (self.num_classes if self.per_class else 1, size, size)
        self.counts = torch.zeros(self.num_classes, dtype=torch.float64, device=device)
        self.sums = torch.zeros(self.num_classes, size, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)


def deviations(covariance: Tensor) -> Tensor:
    """Return the features' standard deviations, (D,), those of constant ones raised to a floor.

    Raises:
        ValueError: all features are constant, or not finite.
    """
    variances = covariance.diagonal()
    if not bool(variances.isfinite().all()):
        raise ValueError("The features have NaN or infinite values.")
    largest = variances.max().clamp_min(0).sqrt()
    if largest == 0:
        raise ValueError("The features are the same for every row, so there is no density of them.")
    return variances.clamp_min(0).sqrt().clamp_min(_FLOOR * largest)


def shrunk(matrix: Tensor, freedom: float) -> Tensor:
    """Shrink a covariance of standardised features by OAS, (D, D); ``freedom``: its degrees of freedom."""
    size = len(matrix)
    trace, square = matrix.trace(), matrix.square().sum()
    numerator = (1 - 2 / size) * square + trace.square()
    denominator = (freedom + 1 - 2 / size) * (square - trace.square() / size)
    weight = 1.0 if denominator <= 0 else min(1.0, float(numerator / denominator))
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    return (1 - weight) * matrix + weight * (trace / size) * identity


def whitener(covariance: Tensor, freedom: float, scale: Tensor) -> Tensor:
    """Return W, (D, D), with W^T W = the inverse of the shrunk covariance.

    Args:
        covariance: (D, D).
        freedom: its degrees of freedom.
        scale: standard deviations of the features, (D,), by which they are divided before the shrinkage.
    """
    factor = torch.linalg.cholesky(shrunk(covariance / torch.outer(scale, scale), freedom))
    identity = torch.eye(len(scale), dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse / scale
