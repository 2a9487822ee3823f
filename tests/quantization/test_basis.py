"""Coded eigenvectors: the sharp ones precise, the flat ones orthogonal to them."""

from __future__ import annotations

import pytest
import torch

from bayeformers.quantization.basis import SHARP, Basis
from bayeformers.quantization.codes import Codes

pytestmark = pytest.mark.filterwarnings("error")


def orthonormal(groups: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(groups, size, size))[0]


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 2), (3, 9), (2, 40)])
def test_columns_are_in_their_places(groups: int, size: int) -> None:
    vectors, curvature = orthonormal(groups, size), torch.rand(groups, size)
    found = Basis.of(vectors, curvature).matrix()
    assert found.shape == vectors.shape
    # a code is off by half of max / 127 at most; the projection takes out no more than there is of error
    assert (found - vectors).norm(dim=-2).max() < 2 * size**0.5 / 254 + 1e-6
    sharpest = curvature.argmax(-1)
    for group in range(groups):
        column = (found - vectors)[group, :, sharpest[group]]
        assert column.abs().max() < 1 / 2**15


def test_no_variance_leaks_into_sharp_directions() -> None:
    """Variance 1 in the flat directions, 1e-6 in the sharp ones: plain INT8 columns would bury the latter."""
    size, count = 64, 8
    vectors = orthonormal(1, size)
    curvature = torch.ones(1, size)
    curvature[:, :count] = 1e6
    assert round(SHARP * size) == count
    variance = 1 / curvature[0]

    def seen(basis: torch.Tensor) -> torch.Tensor:
        """Variance of U diag(v) U^T along the true sharp directions."""
        return ((vectors[0, :, :count].mT @ basis).square() * variance).sum(-1)

    plain = Codes.of(vectors[0], axis=1).dequantize()
    assert seen(plain).min() > 10 * 1e-6
    torch.testing.assert_close(
        seen(Basis.of(vectors, curvature).matrix()[0]), torch.full((count,), 1e-6), rtol=0.01, atol=0
    )
