"""`LinearReparameterization` and `LinearFlipout`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .... import nn as bnn
from ...checks import check_number
from .base import VariationalLayer


class _Linear(VariationalLayer):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        bias: bool = True,
    ) -> None:
        self._announce()
        shift = check_number("posterior_mu_init", posterior_mu_init)
        options = self._options(prior_mean, prior_variance, posterior_rho_init, bias)
        super().__init__(in_features, out_features, **options)
        self._shift(shift)

    def forward(self, input: Tensor, return_kl: bool = True) -> Any:
        """(output, kl), or the output alone."""
        return self._with_kl(super().forward(input), return_kl=return_kl)


class LinearReparameterization(_Linear, bnn.Linear):
    """`bayeformers.nn.Linear` with one draw for the whole batch, `forward` -> (output, kl).

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        prior_mean: mean of the prior.
        prior_variance: its standard deviation (see `VariationalLayer`).
        posterior_mu_init: added to torch's own initial weights.
        posterior_rho_init: initial scale softplus(posterior_rho_init).

    Shape: (*, in_features) -> (*, out_features) and ().

    >>> import torch
    >>> output, kl = LinearReparameterization(4, 3)(torch.ones(2, 4))
    >>> output.shape, kl.shape
    (torch.Size([2, 3]), torch.Size([]))
    """

    kind = "reparameterization"


class LinearFlipout(_Linear, bnn.Linear):
    """As `LinearReparameterization`, with one draw per example."""

    kind = "flipout"
