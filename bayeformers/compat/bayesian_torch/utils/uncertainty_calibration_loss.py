"""`AvULoss` without draws, `EaULoss` and `EaCLoss`, over `bayeformers.losses`."""

from __future__ import annotations

from torch import Tensor, nn

from ....losses import avuc_loss, eac_loss, eau_loss
from ...checks import check_positive
from ...deprecation import deprecated

_PATH = "bayesian_torch.utils.uncertainty_calibration_loss"


class _Weighted(nn.Module):
    new: str

    def __init__(self, beta: float = 1) -> None:
        super().__init__()
        deprecated(f"{_PATH}.{type(self).__name__}", f"`beta * bayeformers.losses.{self.new}`")
        self.beta = check_positive("beta", beta)


class AvULoss(_Weighted):
    """beta times the AvUC loss of (N, C) logits. Now: `bayeformers.losses.avuc_loss`.

    Args:
        beta: weight > 0.
    """

    new = "avuc_loss(logits, labels, threshold)"

    def forward(self, logits: Tensor, labels: Tensor, unc_th: float) -> Tensor:
        """Return the weighted loss, a scalar; errors as of `avuc_loss`.

        Args:
            logits: (N, C), or (S, N, C) of S draws.
            labels: (N,) classes.
            unc_th: certain is a predictive entropy of at most this, in nats.
        """
        return self.beta * avuc_loss(logits, labels, unc_th)


class EaULoss(_Weighted):
    """beta times the EaU loss. Now: `bayeformers.losses.eau_loss`.

    Args:
        beta: weight > 0.

    >>> import torch
    >>> error, unc = torch.tensor([0.1, 0.2, 2.0]), torch.tensor([0.1, 0.1, 3.0])
    >>> EaULoss()(error, unc, 1.0, 1.0)
    tensor(0.0040)
    """

    new = "eau_loss(error, uncertainty, error_threshold, uncertainty_threshold)"

    def forward(self, error: Tensor, unc: Tensor, error_th: float, unc_th: float) -> Tensor:
        """Return the weighted loss, a scalar; errors as of `eau_loss`.

        Args:
            error: errors >= 0, of any shape.
            unc: uncertainties >= 0, of the same shape.
            error_th: a low error is one of at most this, in its unit.
            unc_th: certain is an uncertainty of at most this, in its unit.
        """
        return self.beta * eau_loss(error, unc, error_th, unc_th)


class EaCLoss(_Weighted):
    """beta times the EaC loss. Now: `bayeformers.losses.eac_loss`.

    Args:
        beta: weight > 0.
    """

    new = "eac_loss(error, confidence, error_threshold, confidence_threshold)"

    def forward(self, error: Tensor, conf: Tensor, error_th: float, conf_th: float) -> Tensor:
        """Return the weighted loss, a scalar; errors as of `eac_loss`.

        Args:
            error: errors >= 0, of any shape.
            conf: confidences in [0, 1], of the same shape.
            error_th: a low error is one of at most this, in its unit.
            conf_th: certain is a confidence of at least this.
        """
        return self.beta * eac_loss(error, conf, error_th, conf_th)
