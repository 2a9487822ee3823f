"""Densities of features against brute force in float64: explicit inverses and determinants, all pairs."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor

from bayeformers.ood.densities import check_gaussian_size, distance, from_moments, unit
from bayeformers.ood.moments import Moments

CLASSES, SIZE = 3, 5
Rows = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def rows() -> Rows:
    """Features of very different scales, with a class axis; labels; and rows to be scored."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    mix = torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64)
    scales = torch.tensor([1.0, 1e3, 1e-3, 10.0, 0.1], dtype=torch.float64)
    noise = torch.randn(60, SIZE, generator=draw, dtype=torch.float64) @ mix
    means = torch.randn(CLASSES, SIZE, generator=draw, dtype=torch.float64)
    new = 2 * torch.randn(20, SIZE, generator=draw, dtype=torch.float64)
    return (noise + means[labels]) * scales + 50, labels, new * scales + 50


def moments_of(features: Tensor, labels: Tensor, *, per_class: bool = False, size: int = 7) -> Moments:
    moments = Moments(CLASSES, per_class=per_class, origin=features[0])
    for start in range(0, len(features), size):
        moments.add(features[start : start + size], labels[start : start + size])
    return moments


def shrunk_by_hand(centred: NDArray[np.float64], freedom: int, scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chen et al. 2010, eq. 23, on rows / scale, from the eigenvalues."""
    values, vectors = np.linalg.eigh(centred.T @ centred / freedom / np.outer(scale, scale))
    p, t, q = len(values), values.sum(), np.sum(values**2)
    weight = min(1.0, ((1 - 2 / p) * q + t**2) / ((freedom + 1 - 2 / p) * (q - t**2 / p)))
    mixed = (1 - weight) * values + weight * values.mean()
    return np.asarray(vectors @ np.diag(mixed) @ vectors.T * np.outer(scale, scale))


def parts_of(rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    x, y, new = (part.numpy() for part in rows)
    return x, y, new, x.std(0, ddof=1)


def squares(x: NDArray[np.float64], mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    difference = x - mean
    return np.asarray(np.einsum("ni,ij,nj->n", difference, np.linalg.inv(covariance), difference))


def test_mahalanobis_and_relative_are_the_formulas(rows: Rows) -> None:
    x, y, new, scale = parts_of(rows)
    means = np.stack([x[y == c].mean(0) for c in range(CLASSES)])
    within = shrunk_by_hand(x - means[y], len(x) - CLASSES, scale)
    total = shrunk_by_hand(x - x.mean(0), len(x) - 1, scale)
    nearest = np.min([squares(new, mean, within) for mean in means], axis=0)
    moments = moments_of(*rows[:2])
    np.testing.assert_allclose(
        distance("mahalanobis", rows[2], from_moments(["mahalanobis"], moments)["mahalanobis"]), nearest
    )
    relative = distance(
        "relative_mahalanobis", rows[2], from_moments(["relative_mahalanobis"], moments)["relative_mahalanobis"]
    )
    np.testing.assert_allclose(relative, nearest - squares(new, x.mean(0), total), rtol=1e-6)


def test_gaussians_are_a_mixture_by_inverse_and_determinant(rows: Rows) -> None:
    x, y, new, scale = parts_of(rows)
    density = np.zeros(len(new))
    for label in range(CLASSES):
        own = x[y == label]
        covariance = shrunk_by_hand(own - own.mean(0), len(own) - 1, scale)
        exponent = -0.5 * (squares(new, own.mean(0), covariance) + np.linalg.slogdet(2 * np.pi * covariance)[1])
        density += len(own) / len(x) * np.exp(exponent)
    found = distance("gaussian", rows[2], from_moments(["gaussian"], moments_of(*rows[:2], per_class=True))["gaussian"])
    np.testing.assert_allclose(found, -np.log(density))


def test_neighbours_are_those_of_all_pairs(rows: Rows) -> None:
    x, _, new, _ = parts_of(rows)
    pairs = cdist(new / np.linalg.norm(new, axis=1, keepdims=True), x / np.linalg.norm(x, axis=1, keepdims=True))
    tensors = {"references": unit(rows[0]), "neighbours": torch.tensor(4)}
    # the squared distance is a difference of two numbers near 2: errors of sqrt(2 eps) at distance 0
    np.testing.assert_allclose(distance("knn", rows[2], tensors), np.sort(pairs, axis=1)[:, 3], atol=3e-8)


@pytest.mark.parametrize("method", ["mahalanobis", "relative_mahalanobis", "gaussian"])
def test_scores_ignore_the_unit_of_every_feature(method: str, rows: Rows) -> None:
    unit_of = torch.tensor([10.0, 0.1, 3.0, 7.0, 0.5], dtype=torch.float64)
    first, second = (
        distance(
            method, rows[2] * by, from_moments([method], moments_of(rows[0] * by, rows[1], per_class=True))[method]
        )
        for by in (torch.ones(SIZE, dtype=torch.float64), unit_of)
    )
    if method == "gaussian":  # a density has the unit's Jacobian
        second = second - unit_of.log().sum()
    torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-7)


def test_batches_do_not_matter(rows: Rows) -> None:
    whole, parts = (moments_of(*rows[:2], size=size) for size in (60, 1))
    torch.testing.assert_close(whole.within()[0], parts.within()[0], rtol=1e-10, atol=1e-10)


def test_classes_without_rows_are_left_out(rows: Rows) -> None:
    few = moments_of(rows[0], rows[1].clamp_max(1))
    assert few.num_classes == CLASSES
    assert from_moments(["mahalanobis"], few)["mahalanobis"]["means"].shape == (2, SIZE)


def test_more_features_than_rows_still_have_a_distance() -> None:
    features = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments(1)
    moments.add(features, torch.zeros(6, dtype=torch.long))
    found = distance("mahalanobis", 3 * features, from_moments(["mahalanobis"], moments)["mahalanobis"])
    assert bool(found.isfinite().all())
    assert bool(
        (found > distance("mahalanobis", features, from_moments(["mahalanobis"], moments)["mahalanobis"])).all()
    )


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (torch.ones(1, 3), [0], "at least 2 rows"),
        (torch.ones(5, 3), [0] * 5, "the same for every row"),
        (torch.full((5, 3), torch.nan), [0] * 5, "NaN or infinite"),
        (torch.eye(3), [0, 1, 2], "a class with at least 2 rows"),
    ],
)
def test_what_has_no_density_is_refused(features: Tensor, labels: list[int], match: str) -> None:
    moments = Moments(CLASSES)
    moments.add(features, torch.tensor(labels))
    with pytest.raises(ValueError, match=match):
        from_moments(["mahalanobis"], moments)["mahalanobis"]


def test_too_many_gaussians_are_refused() -> None:
    check_gaussian_size(150, 768)
    with pytest.raises(ValueError, match="take 'mahalanobis'"):
        check_gaussian_size(1000, 4096)
