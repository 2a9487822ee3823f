"""`to_scalabl`: LoRA with one variance per rank, trained by variational inference (Samplawski et al. 2025)."""

from __future__ import annotations

from torch import nn

from ..checks import check_number
from ..conversion.convert import to_bayesian
from ..distributions import NormalPrior
from .layers import lora_pairs

__all__ = ["to_scalabl"]


def to_scalabl(model: nn.Module, *, delta: float = 0.1, prior_std: float = 0.5) -> nn.Module:
    r"""Make the ranks of the active LoRA adapter Bayesian, in place: B diag(r) A with r ~ N(1, diag(sigma^2)).

    ScalaBL (Samplawski et al. 2025, arXiv 2506.21408): A and B map an r-dimensional space into that of the weights, and
    inference is in this space alone: r variances per layer, about 1,000 numbers of a large model. A and B train along,
    without a prior; they take up the mean of r, which therefore stays 1. With so few random numbers the plain ELBO
    (``kl_weight`` 1) has nothing to drown the data in.

    Args:
        model: a PEFT model with an active LoRA adapter.
        delta: initial standard deviation of r, > 0, relative to its mean 1.
        prior_std: of the prior N(1, prior_std^2), > 0.

    Returns:
        The same object.

    Raises:
        TypeError: ``model`` is not a module, or a number is none.
        ValueError: a number that is not > 0, no active LoRA adapter, or what `to_bayesian` refuses.
    """
    check_number("prior_std", prior_std, 0.0, strict=True)
    names = [pair.down_name for pair in lora_pairs(model)]
    return to_bayesian(
        model,
        delta,
        freeze=False,
        prior=NormalPrior(std=float(prior_std), centre=1.0),
        scale="additive",
        parametrization="rows",
        target_modules=names,
    )
