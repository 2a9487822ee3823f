"""Bayesian `torch.nn.Linear` and transformers' `Conv1D` (a Linear with a transposed weight, as in GPT-2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers.pytorch_utils
from torch import Tensor

from ..distributions import Prior
from .base import DEFAULT_DELTA, DEFAULT_PRIOR, BayesianModule
from .estimators import Layout

_TRANSPOSED = Layout(transposed=True)


class Linear(BayesianModule, torch.nn.Linear):
    """`torch.nn.Linear` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
        prior: prior of every weight.
        delta: initial scale relative to |weight|.
        estimator: how the noise enters.

    Shape: (*, in_features) -> (*, out_features).

    >>> layer = Linear(3, 2).eval()
    >>> layer(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    torch_class = torch.nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.become_bayesian(prior=prior, delta=delta, estimator=estimator)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            return super().forward(input)
        return self.active_estimator.affine(F.linear, (input,), self.variational("weight"), self.maybe("bias"))


class Conv1D(BayesianModule, transformers.pytorch_utils.Conv1D):
    """transformers' `Conv1D` (weight (nx, nf), y = x W + b) with Gaussian weights; see :class:`Linear`.

    Shape: (*, nx) -> (*, nf).
    """

    torch_class = transformers.pytorch_utils.Conv1D

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        super().__init__(nf, nx)  # type: ignore[no-untyped-call]
        self.become_bayesian(prior=prior, delta=delta, estimator=estimator)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return output
        weight, bias = self.variational("weight"), self.maybe("bias")
        return self.active_estimator.affine(_conv1d, (x,), weight, bias, _TRANSPOSED)


def _conv1d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = input.reshape(-1, input.shape[-1])
    output = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return output.view(*input.shape[:-1], weight.shape[1])
