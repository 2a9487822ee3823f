"""Rank-1 Bayes: a Linear whose weight is multiplied by r s^T, with Gaussian r and s around 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributions import Prior
from ..distributions.diagonal_normal import ScaleName
from ..sampling.batched import register_batched
from .base import BayesianModule
from .linear import Linear

__all__ = ["FactorLinear", "Rank1Linear", "RankLinear"]


class FactorLinear(BayesianModule, torch.nn.Linear):
    """What Linears share whose weight is deterministic and multiplied by random vectors around 1.

    A subclass names the vectors in `bayesian_parameters` and uses them in its forward; `axes` says which axis of the
    weight each belongs to.
    """

    axes: ClassVar[dict[str, int]] = {"r": 0, "s": 1}
    is_read: ClassVar[bool] = True  # linearised by r and s themselves: a Linear's rule is of a random matrix
    is_factor: ClassVar[bool] = True  # what is merged into the weight is multiplied by r s^T too

    def become_bayesian(self, *, prior: Prior, delta: float, estimator: str, scale: ScaleName = "additive") -> None:
        """As `BayesianModule.become_bayesian`, for the vectors.

        Args:
            prior: of every element of them, such as `NormalPrior(std=0.1, centre=1.0)`.
            delta: initial scale.
            estimator: "reparameterization".
            scale: as of `BayesianModule.become_bayesian`.

        Raises:
            ValueError: another estimator.
        """
        self.check_estimator(estimator)
        self.prepare(self)
        super().become_bayesian(prior=prior, delta=delta, estimator=estimator, scale=scale)

    def become_deterministic(self) -> None:
        """Undo it: the mean of r s^T is 1."""
        super().become_deterministic()
        for name in self.bayesian_parameters:
            del self._parameters[name]

    @classmethod
    def shapes(cls, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Name and shape of each vector of a Linear."""
        sizes = module.get_parameter("weight").shape
        return {name: (sizes[cls.axes[name]],) for name in cls.bayesian_parameters}

    @classmethod
    def prepare(cls, module: nn.Module) -> None:
        """Give a Linear its vectors of 1, in the weight's precision, where it has none."""
        weight = module.get_parameter("weight")
        for name, shape in cls.shapes(module).items():
            if name not in module._parameters:
                ones = torch.ones(shape, dtype=weight.dtype, device=weight.device)
                module.register_parameter(name, nn.Parameter(ones, requires_grad=False))

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """As of a Linear."""
        return Linear.refusal(module)

    @classmethod
    def check_estimator(cls, estimator: object) -> None:
        """Check how the noise is to enter.

        Raises:
            ValueError: not by reparameterization.
        """
        if estimator != "reparameterization":
            raise ValueError(f'`estimator` of rank-1 layers must be "reparameterization", got {estimator!r}.')

    def _factor(self, name: str) -> Tensor:
        return self.variational(name).sample() if self.is_random else self.get_parameter(name)


class Rank1Linear(FactorLinear):
    """`torch.nn.Linear` with the random weight W o (r s^T), r ~ N(1, scale_r^2) and s ~ N(1, scale_s^2).

    y = r o (W (s o x)) + b, one r per output and one s per input: two vectors are random instead of a matrix. W and b
    are deterministic and may train. The means of r and s stay at 1, for W takes up any other; so W is the posterior
    mean of the weight, which whoever reads `.weight` gets. Dusenberry et al. 2020 (arXiv 2005.07186), section 3; the
    same product with one r and s per ensemble member is BatchEnsemble's (Wen et al. 2020, arXiv 2002.06715).

    Its arguments are those of `torch.nn.Linear`, and those of :class:`BayesianModule`; the estimator is
    "reparameterization", and ``delta`` the initial scale of r and s. Of an unconverted Linear `to_bayesian` makes one
    with ``parametrization="rank1"``.

    Attributes:
        r: (out_features,), the means 1; under a draw its value.
        s: (in_features,), likewise.

    Shape: (*, in_features) -> (*, out_features).

    >>> layer = Rank1Linear(3, 2).eval()
    >>> layer(torch.ones(5, 3)).shape, layer.r.tolist(), layer.s_rho.shape
    (torch.Size([5, 2]), [1.0, 1.0], torch.Size([3]))
    """

    torch_class = torch.nn.Linear
    bayesian_parameters = ("r", "s")

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        output = F.linear(input * self._factor("s"), self.weight) * self._factor("r")
        return output if self.bias is None else output + self.bias


class RankLinear(FactorLinear):
    """`torch.nn.Linear` with the random weight diag(r) W, r ~ N(1, scale_r^2): one number per output.

    As the A of a LoRA, y = B diag(r) A x, it is a random scale of each of the adapter's ranks, the whole posterior of
    ScalaBL (Samplawski et al. 2025, arXiv 2506.21408). W and b are deterministic and may train; the means of r stay at
    1, for W takes up any other. Arguments as of :class:`Rank1Linear`; `to_bayesian` makes one with
    ``parametrization="rows"``.

    Attributes:
        r: (out_features,), the means 1; under a draw its value.

    Shape: (*, in_features) -> (*, out_features).

    >>> layer = RankLinear(3, 2).eval()
    >>> layer(torch.ones(5, 3)).shape, layer.r.tolist(), layer.r_rho.shape
    (torch.Size([5, 2]), [1.0, 1.0], torch.Size([2]))
    """

    torch_class = torch.nn.Linear
    bayesian_parameters = ("r",)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        output = F.linear(input, self.weight) * self._factor("r")
        return output if self.bias is None else output + self.bias


def _batched(module: nn.Module, input: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Both for S draws: (S * B, *, in) -> (S * B, *, out); of the vectors each draw has its own."""
    if "s" in values:
        input = _times(input, values["s"])
    output, bias = _times(F.linear(input, module.get_parameter("weight")), values["r"]), module._parameters["bias"]
    return output if bias is None else output + bias


def _times(rows: Tensor, vectors: Tensor) -> Tensor:
    """Multiply the rows (S * B, *, d) of each draw by its vector (S, d)."""
    by_draw = rows.reshape(len(vectors), -1, rows.shape[-1])
    return (by_draw * vectors[:, None]).reshape(rows.shape)


for _kind in (Rank1Linear, RankLinear):
    register_batched(_kind, _batched)
