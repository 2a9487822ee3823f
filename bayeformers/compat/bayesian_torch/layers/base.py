"""What the layers share: their four numbers, `kl_loss()` and the tuple that `forward` returns."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ....distributions import NormalPrior
from ....nn.kl import kl_divergence
from ...checks import check_bool, check_number, check_positive
from ...deprecation import deprecated
from ...sampling import AlwaysRandom


class VariationalLayer(AlwaysRandom):
    """Mixin before a layer of `bayeformers.nn`: prior and posterior by numbers, and the KL beside the output.

    ``prior_variance`` is the prior's standard deviation, as it was: the older package took the logarithm and the square
    of that very number. `layer.prior` says so, ``NormalPrior(std=...)``.

    Attributes:
        kind: the estimator.
        dnn_to_bnn_flag: True lets `forward` return the output alone.
    """

    kind: ClassVar[Literal["reparameterization", "flipout"]]
    dnn_to_bnn_flag: bool = False
    posterior_rho_init: float

    def kl_loss(self) -> Tensor:
        """KL(q || p) of the layer, summed over its weights: a scalar with gradient."""
        return kl_divergence(self)

    def reset_rho(self, name: str) -> None:
        """The scale starts at softplus(posterior_rho_init), whatever the weight is."""
        with torch.no_grad():
            self.get_parameter(f"{name}_rho").fill_(self.posterior_rho_init)

    def _announce(self) -> None:
        new = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("bayeformers.nn."))
        deprecated(
            f"bayesian_torch.layers.{type(self).__name__}",
            f'`bayeformers.nn.{new.__name__}(..., prior=NormalPrior(std, centre), estimator="{self.kind}")` and '
            "`kl_divergence(model)`",
        )

    def _options(self, prior_mean: float, prior_std: float, rho: float, bias: bool) -> dict[str, Any]:
        """Checked arguments of the layer beneath."""
        self.posterior_rho_init = check_number("posterior_rho_init", rho)
        prior = NormalPrior(check_positive("prior_variance", prior_std), check_number("prior_mean", prior_mean))
        return {"prior": prior, "estimator": self.kind, "bias": check_bool("bias", bias)}

    def _shift(self, posterior_mu_init: float) -> None:
        """Means start at torch's own initial weights, whose spread fits the fan-in, plus a constant."""
        with torch.no_grad():
            for name in self.specs:
                self.get_parameter(name).add_(posterior_mu_init)

    def _with_kl(self, *outputs: Any, return_kl: bool) -> Any:
        if check_bool("return_kl", return_kl) and not self.dnn_to_bnn_flag:
            outputs = (*outputs, self.kl_loss())
        return outputs if len(outputs) > 1 else outputs[0]
