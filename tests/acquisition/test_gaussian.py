"""A regression's scores against determinants of the labels' covariance, in float64."""

import numpy as np
import torch

from bayeformers.acquisition import gaussian_bald, gaussian_batchbald, gaussian_entropy, gaussian_epig

GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(9, 6, generator=GENERATOR, dtype=torch.float64) @ torch.randn(6, 6, generator=GENERATOR).double()
NOISE = 0.1 + torch.rand(6, generator=GENERATOR, dtype=torch.float64)
COVARIANCE = np.cov(VALUES.numpy(), rowvar=False, ddof=0)


def information(rows: list[int]) -> float:
    """I(y; f) = 1/2 log det(K + noise) - 1/2 log det(noise)."""
    noise = np.diag(NOISE.numpy()[rows])
    total = np.linalg.slogdet(COVARIANCE[np.ix_(rows, rows)] + noise)[1]
    return float(0.5 * (total - np.linalg.slogdet(noise)[1]))


def test_bald_and_entropy_of_one_label() -> None:
    np.testing.assert_allclose(gaussian_bald(VALUES, NOISE), [information([row]) for row in range(6)], atol=1e-12)
    variances = COVARIANCE.diagonal() + NOISE.numpy()
    np.testing.assert_allclose(gaussian_entropy(VALUES, NOISE), 0.5 * np.log(2 * np.pi * np.e * variances), atol=1e-12)


def test_batch_is_the_greedy_search_by_determinants() -> None:
    chosen, gains = gaussian_batchbald(VALUES, NOISE, 4)
    greedy: list[int] = []
    for _ in range(4):
        left = [row for row in range(6) if row not in greedy]
        greedy.append(max(left, key=lambda row: information([*greedy, row])))
    assert chosen == greedy
    np.testing.assert_allclose(gains.cumsum(0), [information(greedy[:k]) for k in range(1, 5)], atol=1e-10)


def test_epig_is_the_information_between_two_labels() -> None:
    targets, noise = VALUES[:, 3:], NOISE[3:]
    expected = np.zeros(3)
    for i in range(3):
        for t in range(3, 6):
            both = COVARIANCE[np.ix_([i, t], [i, t])] + np.diag(NOISE.numpy()[[i, t]])
            expected[i] += 0.5 * (np.log(np.diag(both)).sum() - np.linalg.slogdet(both)[1]) / 3
    np.testing.assert_allclose(gaussian_epig(VALUES[:, :3], NOISE[:3], targets, noise), expected, atol=1e-12)
