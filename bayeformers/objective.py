"""The KL term of the ELBO over a whole model, and its two parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .distributions import DiagonalNormal, scale_from_rho
from .distributions import kl_divergence as _kl_divergence
from .distributions.kl import has_closed_form
from .distributions.normal_kl import block_size, normal_kl
from .nn.base import NamedVariational, variational_tensors
from .nn.variational import wide


def kl_divergence(model: nn.Module) -> Tensor:
    """KL(q || p) in nats, **summed** over every Bayesian weight of ``model``, each distinct Parameter once.

    Equal to `log_variational_posterior(model) - log_prior(model)`. A prior without a closed form (scale mixture) gives
    the one-draw estimate, with the draw of the latest training forward.

    Returns:
        A float32 scalar (float64 for a float64 model) with gradient in the scales and in the means that train.

    Raises:
        ValueError: ``model`` has no Bayesian layer.
        RuntimeError: a mean was set to train without its prior's centre being stored (see `unfreeze`).

    >>> from bayeformers.nn import Linear
    >>> bool(kl_divergence(Linear(3, 2)) > 0)
    True
    """
    return _sum_over_tensors(model, tensor_kl)


def log_variational_posterior(model: nn.Module) -> Tensor:
    """E_q[log q(w)] = -sum(log sigma + log(2 pi e) / 2) in nats; see :func:`kl_divergence`."""
    return _sum_over_tensors(model, _negative_entropy)


def log_prior(model: nn.Module) -> Tensor:
    """E_q[log p(w)] in nats: `log_variational_posterior(model) - kl_divergence(model)`."""
    return _sum_over_tensors(model, lambda tensor: _negative_entropy(tensor) - tensor_kl(tensor))


def tensor_kl(tensor: NamedVariational) -> Tensor:
    """KL(q || p) of one tensor, summed over its random weights: a scalar."""
    module, rows = tensor.module, tensor.random_rows()
    trained = module.prior_centre(tensor.parameter_name)
    own_centre = module.prior.needs_centre and trained is tensor.loc  # a frozen mean is its own prior's centre
    initial = module.initial_scale(tensor.parameter_name, trained)
    prior: Callable[[Tensor], Any] = functools.partial(module.prior.for_tensor, initial=initial)
    p = prior(wide(trained.detach().reshape(-1)[:1], tensor.rho))
    if isinstance(p, DiagonalNormal):
        return normal_kl(tensor.loc, tensor.rho, None if own_centre else trained, prior, tensor.spec.padding_idx)
    loc, rho, centre = (torch.cat([value[r] for r in rows]) for value in (tensor.loc, tensor.rho, trained))
    q = DiagonalNormal(wide(loc, rho), scale_from_rho(wide(rho, loc)))
    p = prior(q.loc if own_centre else wide(centre, rho))
    if has_closed_form(q, p):
        return _kl_divergence(q, p)
    noise = module.scope.sampling_key().noise(tensor.spec, tensor.loc)
    return _kl_divergence(q, p, torch.cat([noise[r] for r in rows]))


def _negative_entropy(tensor: NamedVariational) -> Tensor:
    half_log_2pie = 0.5 * math.log(2 * math.pi * math.e)
    size = block_size(tensor.rho)
    blocks = [block for rows in tensor.random_rows() for block in torch.split(tensor.rho[rows].reshape(-1), size)]
    logs = [scale_from_rho(wide(block, tensor.loc)).log().sum() for block in blocks]  # it runs in every step's log
    return -torch.stack(logs).sum() - half_log_2pie * sum(block.numel() for block in blocks)


def _sum_over_tensors(model: nn.Module, function: Callable[[NamedVariational], Tensor]) -> Tensor:
    parts = [function(tensor) for tensor in variational_tensors(model)]
    if not parts:
        raise ValueError(f"`model` ({type(model).__name__}) has no Bayesian layer; call `to_bayesian(model)` first.")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
