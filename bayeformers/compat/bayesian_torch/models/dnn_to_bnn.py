"""`dnn_to_bnn` and `get_kl_loss`, over `to_bayesian` and `kl_divergence`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....conversion.convert import to_bayesian
from ....distributions import NormalPrior
from ....nn import variational_tensors
from ....nn.draws import bayesian_modules
from ....nn.kl import kl_divergence, tensor_kl
from ...checks import check_bool, check_number, check_positive
from ...deprecation import deprecated
from ...sampling import draw_in_eval

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LSTM,
)
_TYPES = {"Reparameterization": "reparameterization", "Flipout": "flipout"}


def dnn_to_bnn(m: nn.Module, bnn_prior_parameters: Mapping[str, Any]) -> None:
    """Make the Linear, Conv and LSTM layers of ``m`` Bayesian, in place, means and all other parameters trainable.

    The model goes on drawing in `eval()`, and dropout stays on. Now: `to_bayesian(model, ...)`.

    Args:
        m: any module; a single layer converts too.
        bnn_prior_parameters: all of

            * ``prior_mu``, ``prior_sigma``: prior N(prior_mu, prior_sigma^2);
            * ``posterior_mu_init``, ``posterior_rho_init``: where a fresh posterior starts: torch's own initial weights
              plus the former, scale softplus of the latter;
            * ``type``: "Reparameterization" or "Flipout";
            * ``moped_enable``: start instead from the model's weights w0, scale moped_delta |w0|, prior centred at w0;
            * ``moped_delta``: see there.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: a key is missing or unknown, or its value is not allowed; nothing to convert; Bayesian
            already. ``m`` is unchanged then.

    >>> parameters = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0,
    ...               "type": "Flipout", "moped_enable": True, "moped_delta": 0.5}
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> dnn_to_bnn(model, parameters)
    >>> model[0].estimator.name
    'flipout'
    """
    deprecated(
        "bayesian_torch.models.dnn_to_bnn.dnn_to_bnn",
        '`bayeformers.to_bayesian(model, delta, freeze=False, prior=NormalPrior(std), estimator="flipout")`',
    )
    if not isinstance(m, nn.Module):
        raise TypeError(f"`m` must be a torch.nn.Module, got {type(m).__name__}.")
    choice = _Choice.of(bnn_prior_parameters)
    to_bayesian(
        m,
        choice.moped_delta if choice.moped_enable else 0.05,
        freeze=False,
        prior=NormalPrior(choice.prior_sigma, "pretrained" if choice.moped_enable else choice.prior_mu),
        estimator=_TYPES[choice.type],
        target_modules=_targets(m),
        keep_dropout=True,
    )
    if not choice.moped_enable:
        _start_afresh(m, choice)
    draw_in_eval(m)


def get_kl_loss(m: nn.Module, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Return KL(q || p) of all Bayesian layers of ``m``, each distinct Parameter once: a scalar with gradient.

    Now: `kl_divergence(model)`, which is the sum. Beside a mean cross-entropy the ELBO has it divided by the number N
    of training examples.

    Args:
        m: a model with Bayesian layers, converted or built by hand.
        reduction: "sum", the KL of the ELBO; or "mean", the former value: each tensor's KL divided by its number of
            elements, summed over tensors.

    Raises:
        ValueError: unknown ``reduction``; ``m`` has no Bayesian layer.

    >>> from bayeformers.nn import Linear
    >>> layer = Linear(10, 10, bias=False)
    >>> round(float(get_kl_loss(layer) / get_kl_loss(layer, reduction="mean")))
    100
    """
    deprecated(
        "bayesian_torch.models.dnn_to_bnn.get_kl_loss",
        "`bayeformers.kl_divergence(model)`, a sum over weights: beside a mean loss divide it by the number of "
        "training examples, not by the batch size",
    )
    if reduction not in ("sum", "mean"):
        raise ValueError(
            f"`reduction` must be 'sum' (the KL of the ELBO) or 'mean' (per tensor, as formerly), got {reduction!r}."
        )
    tensors = list(variational_tensors(m))
    if reduction == "sum" or not tensors:  # of a model without Bayesian layers `kl_divergence` says so
        return kl_divergence(m)
    return torch.stack([tensor_kl(tensor) / tensor.loc.numel() for tensor in tensors]).sum()


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """The seven keys, checked."""

    prior_mu: float
    prior_sigma: float
    posterior_mu_init: float
    posterior_rho_init: float
    type: str
    moped_enable: bool
    moped_delta: float

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> _Choice:
        if not isinstance(parameters, Mapping):
            raise TypeError(f"`bnn_prior_parameters` must be a dict, got {type(parameters).__name__}.")
        keys = set(cls.__dataclass_fields__)
        if missing := sorted(keys - set(parameters)):
            raise ValueError(f"`bnn_prior_parameters` lacks {missing}; it needs all of {sorted(keys)}.")
        if unknown := sorted(map(str, set(parameters) - keys)):
            raise ValueError(f"`bnn_prior_parameters` has unknown keys {unknown}; it knows {sorted(keys)}.")
        return cls(**parameters)

    def __post_init__(self) -> None:
        for name in ("prior_mu", "posterior_mu_init", "posterior_rho_init"):
            check_number(name, getattr(self, name))
        check_positive("prior_sigma", self.prior_sigma)
        if not isinstance(self.type, str) or self.type not in _TYPES:
            raise ValueError(f"`type` must be one of {sorted(_TYPES)}, got {self.type!r}.")
        check_bool("moped_enable", self.moped_enable)
        if self.moped_enable:
            check_positive("moped_delta", self.moped_delta)


def _targets(model: nn.Module) -> str:
    """A regular expression of the names of the layers that the older package converted, and of what is tied to them."""
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    if not layers:
        kinds = ", ".join(layer.__name__ for layer in _LAYERS)
        raise ValueError(f"`m` ({type(model).__name__}) has no layer to convert; it needs one of {kinds}.")
    weights = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    owners = (
        name
        for name, module in model.named_modules()
        if any(id(parameter) in weights for parameter in module.parameters(recurse=False))
    )
    return f"(?:{'|'.join(map(re.escape, owners))})"


def _start_afresh(model: nn.Module, choice: _Choice) -> None:
    for module in bayesian_modules(model).values():
        if isinstance(module, _LAYERS):  # a table that is tied to one has its values from there
            module.reset_parameters()
    with torch.no_grad():
        for tensor in variational_tensors(model):
            tensor.loc.add_(choice.posterior_mu_init)
            tensor.rho.fill_(choice.posterior_rho_init)
