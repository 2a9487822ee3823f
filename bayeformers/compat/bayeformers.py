"""The call pattern of the older BayeFormers: a copy, wrapped, that draws in every mode and knows its log densities."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import conversion
from ..distributions import NormalPrior, Prior, ScaleMixturePrior
from ..nn import kl, variational_tensors
from ..nn.base import RECORD
from .deprecation import deprecated
from .sampling import draw_in_eval

__all__ = ["Model", "to_bayesian"]

Initialization = Callable[[nn.Parameter, nn.Parameter], Any]

_STD = math.log1p(math.e)  # softplus(1), the prior's scale around pretrained weights
_MIXTURE = ScaleMixturePrior(pi=0.5, std1=1.0, std2=math.exp(-6))  # the prior of a fresh start


class Model(nn.Module):
    """A converted model behind the attribute ``model``; what the wrapper lacks, that model answers.

    Args:
        model: a model that was converted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one draw of the weights, in `train()` and in `eval()`."""
        return self.model(*args, **kwargs)

    def log_prior(self) -> Tensor:
        """E_q[log p(w)] in nats, with gradient. Now: `bayeformers.log_prior(model)`."""
        deprecated("bayeformers.compat.bayeformers.Model.log_prior", "`bayeformers.log_prior(model)`")
        return kl.log_prior(self.model)

    def log_variational_posterior(self) -> Tensor:
        """E_q[log q(w)] in nats, with gradient. Now: `bayeformers.log_variational_posterior(model)`."""
        deprecated(
            "bayeformers.compat.bayeformers.Model.log_variational_posterior",
            "`bayeformers.log_variational_posterior(model)`",
        )
        return kl.log_variational_posterior(self.model)

    def __getattr__(self, name: str) -> Any:
        """`.config`, `.generate`, `.save_pretrained`: the inner model's; but not the record of its conversion."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("model")
            if inner is None or name == RECORD:
                raise
            return getattr(inner, name)


def to_bayesian(
    model: nn.Module,
    initialization: Initialization | None = None,
    prior: Prior | None = None,
    delta: float | None = None,
    freeze: bool = False,
) -> Model:
    """Return a Bayesian copy of ``model``, wrapped. Now: `bayeformers.to_bayesian(model, delta, freeze)`, in place.

    Args:
        model: any `torch.nn.Module`; stays as it is.
        initialization: with ``delta=None``: ``f(mean, rho)`` that fills both Parameters of a tensor in place;
            default mean ~ U(-0.2, 0.2), rho ~ U(-5, -4).
        prior: default N(w0, 1.3133^2) around the weights w0 if ``delta`` is given, else the scale mixture
            0.5 N(0, 1) + 0.5 N(0, exp(-6)^2).
        delta: start from the weights w0 with scale delta |w0| (MOPED); every layer that can be converted is. None:
            start the layers of class `nn.Linear` afresh.
        freeze: train the scales alone; needs ``delta``.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: what `bayeformers.to_bayesian` refuses; ``freeze`` or ``initialization`` where they would
            do nothing.

    >>> model = to_bayesian(nn.Linear(3, 2), delta=0.05)
    >>> divergence = model.log_variational_posterior() - model.log_prior()
    >>> bool(torch.isclose(divergence, kl.kl_divergence(model)))
    True
    """
    deprecated(
        "bayeformers.compat.bayeformers.to_bayesian",
        "`bayeformers.to_bayesian(model, delta, freeze)`, which converts in place",
    )
    if delta is None and freeze:
        raise ValueError("`freeze=True` needs `delta`: without it the means start at random and must train.")
    if delta is not None and initialization is not None:
        raise ValueError("`initialization` has no part where `delta` is given: the posterior starts at the weights.")
    if initialization is not None and not callable(initialization):
        raise TypeError(f"`initialization` must be a function of (mean, rho), got {initialization!r}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    copied = copy.deepcopy(model)
    if delta is None:
        _start_afresh(copied, initialization or _uniform, _MIXTURE if prior is None else prior)
    else:
        conversion.to_bayesian(copied, delta, freeze, prior=NormalPrior(std=_STD) if prior is None else prior)
    draw_in_eval(copied)
    return Model(copied)


def _start_afresh(model: nn.Module, initialization: Initialization, prior: Prior) -> None:
    names = [re.escape(name) for name, module in model.named_modules() if type(module) is nn.Linear]
    if not names:
        raise ValueError(f"`model` ({type(model).__name__}) has no layer of class `nn.Linear` to start afresh.")
    conversion.to_bayesian(model, freeze=False, prior=prior, target_modules=f"(?:{'|'.join(names)})")
    with torch.no_grad():
        for tensor in variational_tensors(model):
            initialization(tensor.loc, tensor.rho)


def _uniform(mean: nn.Parameter, rho: nn.Parameter) -> None:
    mean.uniform_(-0.2, 0.2)
    rho.uniform_(-5.0, -4.0)
