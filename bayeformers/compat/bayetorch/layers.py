"""`BayesianLinear` and `BayesianConv1D` to `BayesianConv3D`: sigma^2 = alpha mu^2 under an ARD prior."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from ... import nn as bnn
from ...distributions import ARDPrior, scale_from_rho
from ...distributions.diagonal_normal import ScaleName
from ...nn import kl
from ..deprecation import deprecated
from ..sampling import AlwaysRandom

Size = int | tuple[int, ...]

_LOG_ALPHA = -5.0  # where alpha starts


class BayesianLayer(AlwaysRandom):
    """Mixin before a layer of `bayeformers.nn`: weights N(mu, alpha mu^2), |mu| not below a floor; a plain bias.

    The floor, a tenth of the tensor's mean |mu| at the start, keeps weights at zero uncertain.

    Attributes:
        kind: how noise enters in training: per output of a linear layer, per example (at all its positions) of a
            convolution.
    """

    kind: ClassVar[str]
    bayesian_parameters = ("weight",)

    def become_bayesian(self, *, scale: ScaleName = "multiplicative", **options: Any) -> None:
        """As every layer's, with a multiplicative scale."""
        super().become_bayesian(scale=scale, **options)

    def forward(self, X: Tensor) -> Tensor:
        """The layer's output for one draw of the weights, in `train()` and in `eval()`."""
        output: Tensor = super().forward(X)
        if self.b is None or not self.is_random:  # the mean has its bias already
            return output
        return output + self.b.view(-1, *[1] * (self.W.dim() - 2))

    @property
    def kl_divergence(self) -> Tensor:
        """KL(q || p) = 1/2 sum log(1 + mu^2 / sigma^2), a scalar with gradient."""
        return kl.kl_divergence(self)

    @property
    def W(self) -> nn.Parameter:
        """The means; now `weight`."""
        return self.get_parameter("weight")

    @property
    def b(self) -> nn.Parameter | None:
        """Now `bias`."""
        return self._parameters["bias"]

    @property
    def log_alpha(self) -> Tensor:
        """log(sigma^2 / mu^2), from the trained `weight_rho`; a value, not a Parameter."""
        return 2 * scale_from_rho(self.get_parameter("weight_rho")).log()

    def _options(self) -> dict[str, Any]:
        new = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("bayeformers.nn."))
        deprecated(
            f"bayetorch.layers.{type(self).__name__}",
            f'`bayeformers.nn.{new.__name__}`, or `to_bayesian(model, prior=ARDPrior(), scale="multiplicative")`',
        )
        return {"prior": ARDPrior(), "delta": math.exp(_LOG_ALPHA / 2), "estimator": self.kind}


class BayesianLinear(BayesianLayer, bnn.Linear):
    """`torch.nn.Linear` with weights N(mu, alpha mu^2), alpha = exp(-5) at the start.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.

    Shape: (*, in_features) -> (*, out_features).

    >>> layer = BayesianLinear(4, 3)
    >>> 0 < layer.kl_divergence.item() < 30.05  # 12 weights, at most 1/2 log(1 + exp(5)) each
    True
    """

    kind = "local_reparameterization"

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, **self._options())


class _Conv(BayesianLayer):
    kind = "flipout"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        shape = kernel_size, stride, padding, dilation, groups
        super().__init__(in_channels, out_channels, *shape, bias, **self._options())


class BayesianConv1D(_Conv, bnn.Conv1d):
    """`torch.nn.Conv1d` with weights N(mu, alpha mu^2); see :class:`BayesianConv2D`."""


class BayesianConv2D(_Conv, bnn.Conv2d):
    """`torch.nn.Conv2d` with weights N(mu, alpha mu^2), alpha = exp(-5) at the start.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W').

    >>> import torch
    >>> BayesianConv2D(1, 6, 5)(torch.ones(2, 1, 28, 28)).shape
    torch.Size([2, 6, 24, 24])
    """


class BayesianConv3D(_Conv, bnn.Conv3d):
    """`torch.nn.Conv3d` with weights N(mu, alpha mu^2); see :class:`BayesianConv2D`."""
