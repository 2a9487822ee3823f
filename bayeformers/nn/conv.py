"""Bayesian convolutions of torch: `Conv1d` to `Conv3d` and `ConvTranspose1d` to `ConvTranspose3d`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BayesianModule
from .estimators import Layout


class _Convolution(BayesianModule):
    """What `Conv1d`, `Conv2d` and `Conv3d` share: all but their torch class and the axis of their channels.

    The noise of a weight is the same at every position of an image, except under local reparameterization. Padding of
    every mode is a linear map that copies values, so it commutes with the square that local reparameterization takes.
    """

    layout: ClassVar[Layout]
    _conv_forward: Callable[..., Tensor]  # of torch's class: (input, weight, bias)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            output: Tensor = super().forward(input)
            return output
        weight, bias = self.variational("weight"), self.maybe("bias")
        return self.active_estimator.affine(self._conv_forward, (input,), weight, bias, self.layout)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """`torch.nn.Conv1d` with weights N(weight, scale^2); see :class:`Conv2d`.

    Shape: (N, in_channels, L) -> (N, out_channels, L'), or both without N.
    """

    torch_class = torch.nn.Conv1d
    layout = Layout(features=-2)


class Conv2d(_Convolution, torch.nn.Conv2d):
    """`torch.nn.Conv2d` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    Its arguments are those of `torch.nn.Conv2d`, and those of :class:`BayesianModule`.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W'), or both without N.

    >>> layer = Conv2d(3, 8, kernel_size=(3, 5), stride=2, padding=(1, 2), padding_mode="reflect").eval()
    >>> layer(torch.ones(2, 3, 6, 6)).shape
    torch.Size([2, 8, 3, 3])
    """

    torch_class = torch.nn.Conv2d
    layout = Layout(features=-3)


class Conv3d(_Convolution, torch.nn.Conv3d):
    """`torch.nn.Conv3d` with weights N(weight, scale^2); see :class:`Conv2d`.

    Shape: (N, in_channels, D, H, W) -> (N, out_channels, D', H', W'), or both without N.
    """

    torch_class = torch.nn.Conv3d
    layout = Layout(features=-4)


class _ConvolutionTranspose(BayesianModule):
    """What `ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d` share.

    Attributes:
        layout: where the channels are; the weight is (in_channels, out_channels / groups, *kernel_size).
        function: torch's functional form.
    """

    layout: ClassVar[Layout]
    function: ClassVar[Callable[..., Tensor]]
    kernel_size: tuple[int, ...]
    _output_padding: Callable[..., list[int]]  # of torch's class

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the layer's output with its mean, its held draw or fresh noise.

        ``output_size`` chooses among the sizes that ``stride`` leaves open, as in torch.
        """
        if not self.is_random:
            output: Tensor = super().forward(input, output_size)
            return output
        weight, bias = self.variational("weight"), self.maybe("bias")
        operation = self._operation(input, output_size)
        return self.active_estimator.affine(operation, (input,), weight, bias, self.layout)

    def _operation(self, input: Tensor, output_size: Sequence[int] | None) -> Callable[..., Tensor]:
        geometry: dict[str, Any] = {name: getattr(self, name) for name in ("stride", "padding", "dilation")}
        sizes = {**geometry, "kernel_size": self.kernel_size, "num_spatial_dims": len(self.kernel_size)}
        output_padding = self._output_padding(input, output_size, **sizes)
        return functools.partial(type(self).function, output_padding=output_padding, groups=self.groups, **geometry)


class ConvTranspose1d(_ConvolutionTranspose, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` with weights N(weight, scale^2); see :class:`ConvTranspose2d`.

    Shape: (N, in_channels, L) -> (N, out_channels, L'), or both without N.
    """

    torch_class = torch.nn.ConvTranspose1d
    layout = Layout(features=-2, transposed=True)
    function = F.conv_transpose1d


class ConvTranspose2d(_ConvolutionTranspose, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    Its arguments are those of `torch.nn.ConvTranspose2d`, and those of :class:`BayesianModule`.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W'), or both without N.

    >>> layer = ConvTranspose2d(8, 3, kernel_size=3, stride=2, padding=1).train()
    >>> layer(torch.ones(2, 8, 3, 3), output_size=(6, 6)).shape
    torch.Size([2, 3, 6, 6])
    """

    torch_class = torch.nn.ConvTranspose2d
    layout = Layout(features=-3, transposed=True)
    function = F.conv_transpose2d


class ConvTranspose3d(_ConvolutionTranspose, torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` with weights N(weight, scale^2); see :class:`ConvTranspose2d`.

    Shape: (N, in_channels, D, H, W) -> (N, out_channels, D', H', W'), or both without N.
    """

    torch_class = torch.nn.ConvTranspose3d
    layout = Layout(features=-4, transposed=True)
    function = F.conv_transpose3d
