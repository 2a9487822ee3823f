"""`Conv1dReparameterization` to `ConvTranspose3dFlipout`, their arguments in the older package's order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .... import nn as bnn
from ...checks import check_number
from .base import VariationalLayer

Size = int | tuple[int, ...]


class _Conv(VariationalLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        bias: bool = True,
        **more: Any,
    ) -> None:
        self._announce()
        shift = check_number("posterior_mu_init", posterior_mu_init)
        options = self._options(prior_mean, prior_variance, posterior_rho_init, bias)
        shape: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        super().__init__(in_channels, out_channels, kernel_size, **shape, **options, **more)
        self._shift(shift)

    def forward(self, input: Tensor, return_kl: bool = True) -> Any:
        """(output, kl), or the output alone."""
        return self._with_kl(super().forward(input), return_kl=return_kl)


class _ConvTranspose(_Conv):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        output_padding: Size = 0,
        *gaussians: Any,
        **options: Any,
    ) -> None:
        shape = stride, padding, dilation, groups
        super().__init__(
            in_channels, out_channels, kernel_size, *shape, *gaussians, output_padding=output_padding, **options
        )


class _OutputPaddingEarly(_ConvTranspose):
    """Two classes had `output_padding` before `dilation`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        *gaussians: Any,
        **options: Any,
    ) -> None:
        shape = stride, padding, dilation, groups, output_padding
        super().__init__(in_channels, out_channels, kernel_size, *shape, *gaussians, **options)


class Conv1dReparameterization(_Conv, bnn.Conv1d):
    """`bayeformers.nn.Conv1d` with one draw for the whole batch; see `Conv2dReparameterization`."""

    kind = "reparameterization"


class Conv1dFlipout(_Conv, bnn.Conv1d):
    """As `Conv1dReparameterization`, with one draw per example."""

    kind = "flipout"


class Conv2dReparameterization(_Conv, bnn.Conv2d):
    """`bayeformers.nn.Conv2d` with one draw for the whole batch, `forward` -> (output, kl).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `torch.nn.Conv2d`.
        prior_mean, prior_variance, posterior_mu_init, posterior_rho_init: as in `LinearReparameterization`.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H', W') and ().

    >>> import torch
    >>> output, kl = Conv2dReparameterization(1, 2, kernel_size=3)(torch.ones(5, 1, 8, 8))
    >>> output.shape
    torch.Size([5, 2, 6, 6])
    """

    kind = "reparameterization"


class Conv2dFlipout(_Conv, bnn.Conv2d):
    """As `Conv2dReparameterization`, with one draw per example."""

    kind = "flipout"


class Conv3dReparameterization(_Conv, bnn.Conv3d):
    """`bayeformers.nn.Conv3d` with one draw for the whole batch; the four numbers come before the stride."""

    kind = "reparameterization"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        shape = stride, padding, dilation, groups
        gaussians = prior_mean, prior_variance, posterior_mu_init, posterior_rho_init
        super().__init__(in_channels, out_channels, kernel_size, *shape, *gaussians, bias=bias)


class Conv3dFlipout(_Conv, bnn.Conv3d):
    """As `Conv3dReparameterization`, with one draw per example; its arguments stand as in `Conv2dFlipout`."""

    kind = "flipout"


class ConvTranspose1dReparameterization(_ConvTranspose, bnn.ConvTranspose1d):  # type: ignore[misc]
    """`bayeformers.nn.ConvTranspose1d` with one draw for the whole batch; `output_padding` follows `groups`."""

    kind = "reparameterization"


class ConvTranspose1dFlipout(_ConvTranspose, bnn.ConvTranspose1d):  # type: ignore[misc]
    """As `ConvTranspose1dReparameterization`, with one draw per example."""

    kind = "flipout"


class ConvTranspose2dReparameterization(_ConvTranspose, bnn.ConvTranspose2d):  # type: ignore[misc]
    """`bayeformers.nn.ConvTranspose2d` with one draw for the whole batch; `output_padding` follows `groups`."""

    kind = "reparameterization"


class ConvTranspose2dFlipout(_OutputPaddingEarly, bnn.ConvTranspose2d):  # type: ignore[misc]
    """`bayeformers.nn.ConvTranspose2d` with one draw per example; `output_padding` follows `padding`."""

    kind = "flipout"


class ConvTranspose3dReparameterization(_ConvTranspose, bnn.ConvTranspose3d):  # type: ignore[misc]
    """`bayeformers.nn.ConvTranspose3d` with one draw for the whole batch; `output_padding` follows `groups`."""

    kind = "reparameterization"


class ConvTranspose3dFlipout(_OutputPaddingEarly, bnn.ConvTranspose3d):  # type: ignore[misc]
    """`bayeformers.nn.ConvTranspose3d` with one draw per example; `output_padding` follows `padding`."""

    kind = "flipout"
