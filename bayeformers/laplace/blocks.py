"""One layer of a Laplace posterior: N(theta*, (F / (T s^2) + tau)^-1), a `GaussianBlock` for one or several tau.

The curvature may live on another device than the layer, where a GPU has no room for all of it, and in another dtype,
for the model may have been cast since: what is asked for is moved to the layer, one layer at a time, and forgotten
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..linearized import LayerRule
from ..linearized.separable import Separable
from ..sampling.generators import NOISE_VERSION
from .kronecker import KroneckerEigen
from .targets import Target


class TargetBlock:
    """What a `GaussianBlock` says of its layer: all of it the target's."""

    target: Target

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.target.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The layers that use the parameters."""
        return self.target.modules

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The Parameters, by "weight" and "bias"."""
        return self.target.parameters

    @property
    def rule(self) -> LayerRule:
        """That of the layer's class."""
        return self.target.rule


@dataclass(frozen=True, eq=False)
class LaplaceBlock(TargetBlock):
    """See `GaussianBlock`.

    Attributes:
        target: the layer.
        eigen: its curvature F; of shape (1, 1, p) where the block is dense.
        prior_precisions: tau of each of the n posteriors.
        likelihood_precision: 1 / (temperature noise_std^2), which multiplies F.
        is_flat: whether the block is dense.
        noise_version: which draws, see `bayeformers.sampling.generators`.
    """

    target: Target
    eigen: KroneckerEigen
    prior_precisions: tuple[float, ...]
    likelihood_precision: float = 1.0
    is_flat: bool = False
    noise_version: int = NOISE_VERSION
    _known: dict[tuple[float, torch.dtype], Separable | None] = field(default_factory=dict, repr=False)

    @property
    def left(self) -> Tensor | None:
        """U_G on the layer's device; None: the identity."""
        return None if self.eigen.left is None else self.placed(self.eigen.left)

    @property
    def right(self) -> Tensor | None:
        """U_A on the layer's device; None: the identity."""
        return None if self.eigen.right is None else self.placed(self.eigen.right)

    @property
    def device(self) -> torch.device:
        """The layer's."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The layer's, or float32 if that is narrower: in which Jacobians are captured."""
        return torch.promote_types(next(iter(self.parameters.values())).dtype, torch.float32)

    def placed(self, tensor: Tensor) -> Tensor:
        """A tensor of the curvature, on the layer's device and in `dtype`."""
        return tensor.to(self.device, self.dtype)

    def variances(self) -> Tensor:
        """1 / (L / (T s^2) + tau), (n, K, d_out, d_in'); 0 in a table's padding row, which is not random."""
        return self.placed(self._variances())

    def prior_variances(self) -> Tensor:
        """1 / tau, (n,)."""
        return self.placed(torch.tensor([1 / tau for tau in self.prior_precisions], dtype=torch.float64))

    def separable(self, tolerance: float) -> Separable | None:
        """Found once, as no data to come changes it; None for several posteriors or groups, or without a basis."""
        has_basis = self.eigen.left is not None and self.eigen.right is not None
        is_one = len(self.prior_precisions) == len(self.eigen.eigenvalues) == 1
        if tolerance == 0 or not (has_basis and is_one):
            return None
        key = (tolerance, self.dtype)
        if key not in self._known:
            made = Separable.from_variances(self._variances()[0, 0].to(self.dtype), tolerance)
            left, right = (basis.to(self.dtype) for basis in (self.eigen.left, self.eigen.right) if basis is not None)
            self._known[key] = None if made is None else made.with_bases(left, right)
        found = self._known[key]
        return None if found is None else found.to(self.device)

    def _variances(self) -> Tensor:
        found = torch.stack([
            self.eigen.precision(tau, self.likelihood_precision).reciprocal() for tau in self.prior_precisions
        ])
        padding = getattr(self.modules[0], "padding_idx", None)
        if padding is not None and not self.is_flat:  # a dense block's coordinates are no rows of the table
            found[:, :, padding] = 0
        return found
