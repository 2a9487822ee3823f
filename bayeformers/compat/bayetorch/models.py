"""`BayesianModel`: the base of models that are built of Bayesian layers by hand."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from ...nn import kl
from ..deprecation import deprecated
from .convert import copy_weights


class BayesianModel(nn.Module):
    """A module that knows the KL of its layers. Now: any `nn.Module`, and `bayeformers.kl_divergence(model)`."""

    @property
    def kl_divergence(self) -> Tensor:
        """KL(q || p), summed over all Bayesian layers at any depth: a scalar with gradient."""
        deprecated("bayetorch.models.BayesianModel.kl_divergence", "`bayeformers.kl_divergence(model)`")
        return kl.kl_divergence(self)

    def init_with_frequentist(self, frequentist: nn.Module, freeze: bool = True) -> Self:
        """`init_bayesian_with_frequentist` as a method."""
        deprecated("bayetorch.models.BayesianModel.init_with_frequentist", "`bayeformers.to_bayesian(frequentist)`")
        copy_weights(self, frequentist, freeze)
        return self
