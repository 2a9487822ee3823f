"""Losses besides the likelihoods that transformers has: calibration terms, and the Gaussian with a variance head."""

from ..likelihoods.gaussian import LOG_VARIANCE_RANGE, gaussian_nll, split_variance_head
from .avu import auavu_loss, avuc_loss
from .error_aligned import eac_loss, eau_loss

__all__ = [
    "LOG_VARIANCE_RANGE",
    "auavu_loss",
    "avuc_loss",
    "eac_loss",
    "eau_loss",
    "gaussian_nll",
    "split_variance_head",
]
