"""Bayesian `torch.nn.Bilinear`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributions import Prior
from .base import DEFAULT_DELTA, DEFAULT_PRIOR, BayesianModule


class Bilinear(BayesianModule, torch.nn.Bilinear):
    """`torch.nn.Bilinear`, y_o = x1^T W_o x2 + b_o, with Gaussian weights: random in `train()`, the mean in `eval()`.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as in `torch.nn.Bilinear`.
        prior: prior of every weight.
        delta: initial scale relative to |weight|.
        estimator: how the noise enters. Flipout has signs on all three axes of the weight.

    Shape: (*, in1_features), (*, in2_features) -> (*, out_features).

    >>> layer = Bilinear(3, 4, 2).eval()
    >>> layer(torch.ones(5, 3), torch.ones(5, 4)).shape
    torch.Size([5, 2])
    """

    torch_class = torch.nn.Bilinear

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        super().__init__(in1_features, in2_features, out_features, bias, device, dtype)
        self.become_bayesian(prior=prior, delta=delta, estimator=estimator)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            return super().forward(input1, input2)
        weight, bias = self.variational("weight"), self.maybe("bias")
        return self.active_estimator.affine(F.bilinear, (input1, input2), weight, bias)
