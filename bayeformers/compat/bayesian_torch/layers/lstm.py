"""`LSTMReparameterization` and `LSTMFlipout`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .... import nn as bnn
from ...checks import check_number
from .base import VariationalLayer


class _LSTM(VariationalLayer):
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
        super().__init__(in_features, out_features, batch_first=True, **options)
        self._shift(shift)

    def forward(
        self, X: Tensor, hidden_states: tuple[Tensor, Tensor] | None = None, return_kl: bool = True
    ) -> tuple[Any, ...]:
        """(output, (h_n, c_n), kl), or without the kl; states of shape (B, H) or torch's (1, B, H)."""
        if hidden_states is not None and X.dim() == 3:
            hidden, cell = (state.unsqueeze(0) if state.dim() == 2 else state for state in hidden_states)
            hidden_states = hidden, cell
        outputs: tuple[Any, ...] = self._with_kl(*super().forward(X, hidden_states), return_kl=return_kl)
        return outputs


class LSTMReparameterization(_LSTM, bnn.LSTM):  # type: ignore[misc]
    """`bayeformers.nn.LSTM` with one draw per batch, held along the sequence; `forward` -> (output, (h_n, c_n), kl).

    Args:
        in_features, out_features: `input_size` and `hidden_size` of `torch.nn.LSTM`.
        prior_mean, prior_variance, posterior_mu_init, posterior_rho_init, bias: as in `LinearReparameterization`.

    Shape: (B, T, in_features) -> (B, T, out_features), states (1, B, out_features) as torch's, and ().

    >>> import torch
    >>> output, (hidden, cell), kl = LSTMReparameterization(4, 3)(torch.ones(2, 5, 4))
    >>> output.shape, hidden.shape
    (torch.Size([2, 5, 3]), torch.Size([1, 2, 3]))
    """

    kind = "reparameterization"


class LSTMFlipout(_LSTM, bnn.LSTM):  # type: ignore[misc]
    """As `LSTMReparameterization`, with one draw per example."""

    kind = "flipout"
