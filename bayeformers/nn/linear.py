"""Bayesian `torch.nn.Linear`, `torch.nn.Bilinear`, and transformers' `Conv1D` (a transposed Linear, as in GPT-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers.pytorch_utils
from torch import Tensor

from ..sampling import batched
from .base import BayesianModule
from .estimators import Layout

_TRANSPOSED = Layout(transposed=True)


class Linear(BayesianModule, torch.nn.Linear):
    """`torch.nn.Linear` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    Its arguments are those of `torch.nn.Linear`, and those of :class:`BayesianModule`.

    Shape: (*, in_features) -> (*, out_features).

    >>> layer = Linear(3, 2).eval()
    >>> layer(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    torch_class = torch.nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            return super().forward(input)
        return self.active_estimator.affine(F.linear, (input,), self.variational("weight"), self.maybe("bias"))


class Bilinear(BayesianModule, torch.nn.Bilinear):
    """`torch.nn.Bilinear`, y_o = x1^T W_o x2 + b_o, with Gaussian weights; see :class:`Linear`.

    Flipout has signs on all three axes of the weight.

    Shape: (*, in1_features), (*, in2_features) -> (*, out_features).

    >>> layer = Bilinear(3, 4, 2).eval()
    >>> layer(torch.ones(5, 3), torch.ones(5, 4)).shape
    torch.Size([5, 2])
    """

    torch_class = torch.nn.Bilinear

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            return super().forward(input1, input2)
        weight, bias = self.variational("weight"), self.maybe("bias")
        return self.active_estimator.affine(F.bilinear, (input1, input2), weight, bias)


class Conv1D(BayesianModule, transformers.pytorch_utils.Conv1D):
    """transformers' `Conv1D` (weight (nx, nf), y = x W + b) with Gaussian weights; see :class:`Linear`.

    Shape: (*, nx) -> (*, nf).
    """

    torch_class = transformers.pytorch_utils.Conv1D

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


batched.register_batched(Linear, batched.linear)
batched.register_batched(Conv1D, batched.conv1d)
