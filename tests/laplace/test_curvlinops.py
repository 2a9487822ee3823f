"""KFAC against curvlinops, where both mean the same: a network without padding, biases joined to their weights.

It depends on torchvision (through backpack), which this package's environment must not have, so it is installed beside
it, without its dependencies:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 \
        linear_operator==0.6.1 opt_einsum==3.4.0 unfoldNd==0.2.3
    bash scripts/test.sh -m slow tests/laplace/test_curvlinops.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayeformers.laplace import KroneckerEigen, fit

pytestmark = pytest.mark.slow


def dense(eigen: KroneckerEigen) -> Tensor:
    """Curvature of one layer in matrix form, flattened row by row; the bias is the last column."""
    basis = torch.kron(eigen.left[0].contiguous(), eigen.right[0].contiguous())
    return basis @ torch.diag(eigen.eigenvalues[0].flatten()) @ basis.T


def rows_joined(matrix: Tensor, start: int, layer: nn.Linear) -> Tensor:
    """The block of a layer's weight and bias, whose Parameters stand one after the other, in the order of `dense`."""
    n, width = layer.weight.numel(), layer.in_features
    order = [
        [*range(start + row * width, start + (row + 1) * width), start + n + row] for row in range(len(layer.bias))
    ]
    index = torch.tensor(sum(order, []))
    return matrix[index][:, index]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_factors_are_those_of_curvlinops(likelihood: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = torch.randn(7, 4, dtype=torch.float64)
    is_regression = likelihood == "regression"
    labels = torch.randn(7, 3, dtype=torch.float64) if is_regression else torch.arange(7) % 3
    batches = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    posterior = fit(
        network,
        batches,
        likelihood=likelihood,
        curvature="kfac",
        fisher="exact",
        prior_precision=1.0,
        progress=False,
        **({"noise_std": 1.0} if is_regression else {}),
    )
    loss = nn.MSELoss(reduction="sum") if is_regression else nn.CrossEntropyLoss(reduction="sum")
    operator = curvlinops.KFACLinearOperator(
        network,
        loss,
        list(network.parameters()),
        batches,
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=curvlinops.KFACType.EXPAND,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    theirs = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    theirs = theirs / 2 if is_regression else theirs  # its loss is the squared error, twice the NLL at noise 1
    start = 0
    for name in ("0", "2"):
        layer = network.get_submodule(name)
        torch.testing.assert_close(dense(posterior.layers[name]), rows_joined(theirs, start, layer), rtol=0, atol=1e-13)
        start += layer.weight.numel() + layer.bias.numel()
