"""`AvULoss` and `AUAvULoss`, over `bayeformers.losses`."""

from __future__ import annotations

from torch import Tensor, nn

from ....losses import auavu_loss, avuc_loss
from ....losses.avu import UNCERTAINTIES, Uncertainty
from ...checks import check_positive
from ...deprecation import deprecated
from .util import mutual_information, predictive_entropy

__all__ = ["AUAvULoss", "AvULoss", "mutual_information", "predictive_entropy"]


class AvULoss(nn.Module):
    """beta times the AvUC loss at a threshold. Now: `bayeformers.losses.avuc_loss`.

    Args:
        beta: weight > 0.

    >>> import torch
    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.2, 0.0]])
    >>> AvULoss(beta=2)(logits, torch.tensor([0, 1, 1]), 0.4)
    tensor(0.0109)
    """

    def __init__(self, beta: float = 1) -> None:
        super().__init__()
        deprecated(
            "bayesian_torch.utils.avuc_loss.AvULoss", "`beta * bayeformers.losses.avuc_loss(logits, labels, threshold)`"
        )
        self.beta = check_positive("beta", beta)

    def forward(self, logits: Tensor, labels: Tensor, optimal_uncertainty_threshold: float, type: int = 0) -> Tensor:
        """Return the weighted loss, a scalar.

        Args:
            logits: (N, C), or (S, N, C) of S draws.
            labels: (N,) classes.
            optimal_uncertainty_threshold: certain is an uncertainty of at most this, in nats.
            type: 0 for the predictive entropy; 1 for the mutual information of the draws.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: another ``type``, draws missing for ``type=1``, or what `avuc_loss` refuses.
        """
        name = _uncertainty(type, logits)
        return self.beta * avuc_loss(logits, labels, optimal_uncertainty_threshold, uncertainty=name)


class AUAvULoss(nn.Module):
    """beta times -log of the area under AvU over thresholds. Now: `bayeformers.losses.auavu_loss`.

    Args:
        beta: weight > 0.
    """

    def __init__(self, beta: float = 1) -> None:
        super().__init__()
        deprecated("bayesian_torch.utils.avuc_loss.AUAvULoss", "`beta * bayeformers.losses.auavu_loss(logits, labels)`")
        self.beta = check_positive("beta", beta)

    def forward(self, logits: Tensor, labels: Tensor, type: int = 0) -> tuple[Tensor, Tensor]:
        """Return (weighted loss, area), scalars.

        Args:
            logits: (N, C), or (S, N, C) of S draws.
            labels: (N,) classes.
            type: 0 for the predictive entropy; 1 for the mutual information of the draws.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: another ``type``, draws missing for ``type=1``, or what `auavu_loss` refuses.
        """
        loss = auavu_loss(logits, labels, uncertainty=_uncertainty(type, logits))
        return self.beta * loss, (-loss).exp()


def _uncertainty(kind: int, logits: Tensor) -> Uncertainty:
    if isinstance(kind, bool) or kind not in (0, 1):
        raise ValueError(f"`type` must be 0 (predictive entropy) or 1 (mutual information), got {kind!r}.")
    if kind == 1 and isinstance(logits, Tensor) and logits.dim() < 3:
        raise ValueError(
            f"`type=1` is the disagreement of draws: `logits` must have shape (S, N, C), got {tuple(logits.shape)}."
        )
    return UNCERTAINTIES[kind]
