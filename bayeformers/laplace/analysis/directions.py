"""The eigen-spectrum of a layer's curvature, one eigen-direction by rank or quantile, and draws along it alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checks import check_draw
from ...linearized.blocks import block_noise
from ...linearized.methods import ranks, select
from ...sampling.views import alone
from ..blocks import LaplaceBlock
from ..moved import by_parameter, holding
from ..posterior import LaplacePosterior


@dataclass(frozen=True, eq=False)
class FactorSpectrum:
    """Eigenvalues of one layer's curvature F = G (x) A, before temperature, noise and prior.

    Attributes:
        gradients: gamma, (K, d_out), of G.
        inputs: alpha, (K, d_in'), of A.
        eigenvalues: of F, (K d_out d_in',) in falling order: with "kfac" the products gamma_i alpha_j.
    """

    gradients: Tensor
    inputs: Tensor
    eigenvalues: Tensor

    def quantile(self, q: float) -> float:
        """Return the eigenvalue below which a share ``q`` of them lies.

        Raises:
            ValueError: ``q`` outside [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"`q` must lie in [0, 1], got {q!r}.")
        return float(self.eigenvalues[round((1 - q) * (len(self.eigenvalues) - 1))])


def factor_spectrum(posterior: LaplacePosterior, layer: str) -> FactorSpectrum:
    """Return what the curvature of one layer looks like along its eigenvectors.

    A posterior keeps L = gamma alpha^T, which leaves one factor between gamma and alpha free: they are given with equal
    sums, gamma_i = sum_j L_ij / sqrt(sum L). Of "ekfac", whose L is no product, they are its marginals, and their
    product has the rows' and columns' sums of L. ``Curvature.factors`` has G and A as they were summed.

    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2, bias=False), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], curvature="kfac", progress=False)
    >>> found = factor_spectrum(posterior, "")
    >>> found.gradients.shape, found.inputs.shape, found.eigenvalues.shape
    (torch.Size([1, 2]), torch.Size([1, 3]), torch.Size([6]))
    """
    eigenvalues = _block(posterior, layer).eigen.eigenvalues
    root = eigenvalues.sum((1, 2)).sqrt().clamp_min(torch.finfo(eigenvalues.dtype).tiny)[:, None]
    falling = eigenvalues.flatten().sort(descending=True).values
    return FactorSpectrum(eigenvalues.sum(2) / root, eigenvalues.sum(1) / root, falling)


@dataclass(frozen=True, eq=False)
class EigenDirection:
    """A unit vector v in the space of one layer's weights with F v = eigenvalue v, and 0 in all other layers.

    Attributes:
        layer: its name.
        index: (k, i, j): column i of U_G and j of U_A of block k.
        eigenvalue: of F, before temperature, noise and prior.
        variance: of the posterior along v, 1 / (eigenvalue / (T s^2) + tau).
        parameters: v, cut into the Parameters' shapes.
    """

    layer: str
    index: tuple[int, int, int]
    eigenvalue: float
    variance: float
    parameters: Mapping[nn.Parameter, Tensor]


def eigen_direction(posterior: LaplacePosterior, direction: int | float, layer: str | None = None) -> EigenDirection:
    """Return the eigen-direction of a rank or quantile, in falling order of the posterior's variance.

    Args:
        posterior: whose directions.
        direction: a rank (int): 0 the least determined, -1 the direction of the largest eigenvalue; or a quantile
            (float): 0.0 the same as rank 0, 1.0 as rank -1.
        layer: of this layer; None: of all layers together.

    Raises:
        ValueError: there is no such rank, quantile or layer; or it is one of a table's padding row, which is not
            random and which curvature="dense" alone has among its directions.

    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], prior_precision=1.0, progress=False)
    >>> best_known = eigen_direction(posterior, -1)
    >>> f"{sum(v.square().sum() for v in best_known.parameters.values()):.4f}"
    '1.0000'
    >>> best_known.eigenvalue > eigen_direction(posterior, 0.5).eigenvalue
    True
    """
    blocks = posterior.blocks() if layer is None else [_block(posterior, layer)]
    ((name, indices),) = select(blocks, *ranks(blocks, direction)).items()
    block = next(block for block in blocks if block.name == name)
    shape = block.eigen.eigenvalues.shape
    k, i, j = (int(part) for part in torch.unravel_index(indices[0], shape))
    parameters = by_parameter(block.target, block.placed(block.eigen.direction(k, i, j)))
    if not any(bool(value.any()) for value in parameters.values()):
        raise ValueError(f"`direction`={direction!r} is one of the padding row of {name!r}, which is not random.")
    eigenvalue = float(block.eigen.eigenvalues[k, i, j])
    variance = 1 / (posterior.likelihood_precision * eigenvalue + block.prior_precisions[0])
    return EigenDirection(name, (k, i, j), eigenvalue, variance, parameters)


@contextlib.contextmanager
def draw_along(posterior: LaplacePosterior, direction: EigenDirection, index: int, seed: int = 0) -> Iterator[None]:
    """The model at a draw along one eigen-direction alone, until exit: W = M + sqrt(variance) z v, z ~ N(0, 1).

    Args:
        posterior: whose model.
        direction: of `eigen_direction`.
        index: of the draw, in the sequence ``seed``; a whole number >= 0.
        seed: the same seed gives the same draws.

    Raises:
        ValueError: the direction belongs to another model.

    >>> from bayeformers.laplace import fit
    >>> net, x = nn.Linear(3, 2), torch.randn(20, 3)
    >>> posterior = fit(net, [(x, torch.randint(2, (20,)))], progress=False)
    >>> with draw_along(posterior, eigen_direction(posterior, 0), index=0):
    ...     moved = net(x)
    >>> bool((moved != net(x)).any())
    True
    """
    check_draw(index, seed)
    if not set(direction.parameters) <= set(posterior.random_parameters()):
        raise ValueError(f"`direction` lies in the weights of {direction.layer!r} of another model than `posterior`'s.")
    version = posterior.record.noise_version
    z = float(block_noise(f"{direction.layer}/{direction.index}", (1,), index, seed, version))
    step = z * direction.variance**0.5
    moved = {parameter: step * value for parameter, value in direction.parameters.items()}
    with alone(posterior.model), holding(moved):
        yield


def _block(posterior: LaplacePosterior, layer: str) -> LaplaceBlock:
    found = next((block for block in posterior.blocks() if block.name == layer), None)
    if found is None:
        names = [block.name for block in posterior.blocks()]
        raise ValueError(f"`layer` must be one of {names[:5]} (of {len(names)}), got {layer!r}.")
    return found
