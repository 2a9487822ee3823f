"""The KL term of the ELBO over a whole model, and its two parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions import DiagonalNormal, EmpiricalNormal
from ..distributions import kl_divergence as _kl_divergence
from ..distributions.block_kl import block_size, normal_kl, separable_kl
from ..distributions.kl import has_closed_form
from ..processes.dtensors import reshard
from . import kl_watch
from .adapters import active_tensors
from .base import NamedVariational, check_module, record_of, variational_tensors
from .draws import say_once
from .shards import own_parts, sampled_noise, summed_moment, total
from .variational import scale_of, wide

_Density = Callable[[Tensor], Any]
"""The prior density of a part of a tensor, given the trained weights there."""

THAWED = (
    "The mean {!r} of this %s trains, though the conversion froze the means: PEFT's `set_adapter` and "
    "`disable_adapter` set `requires_grad`, for one. Freeze it again, or call `bayeformers.unfreeze(model)` if "
    "training is meant."
)


def kl_divergence(model: nn.Module) -> Tensor:
    """KL(q || p) in nats, **summed** over every Bayesian weight of ``model``, each distinct Parameter once.

    Equal to `log_variational_posterior(model) - log_prior(model)`. A prior without a closed form (scale mixture) gives
    the one-draw estimate, with the draw of the latest training forward. An adapter of PEFT's that is not active, or is
    disabled or merged, has no part in the network, and none in the sum.

    ValueError is raised if ``model`` has no Bayesian layer, RuntimeError if a mean was set to train without its prior's
    centre being stored (see `unfreeze`).

    Returns:
        A float32 scalar (float64 for a float64 model) with gradient in the scales and in the means that train.

    >>> from bayeformers.nn import Linear
    >>> bool(kl_divergence(Linear(3, 2)) > 0)
    True
    """
    check_module(model)
    _tell_of_thawed(model)
    return _sum_over_tensors(model, tensor_kl)


def _tell_of_thawed(model: nn.Module) -> None:
    """Means that train though the conversion froze them; a prior that needs a centre refuses them by itself."""
    record = record_of(model)
    if record is None or not record.config.freeze:
        return
    thawed = next((tensor for tensor in active_tensors(model) if tensor.loc.requires_grad), None)
    if thawed is not None:
        say_once(thawed.module.scope, THAWED.format(thawed.name.replace("%", "%%")), model)


def log_variational_posterior(model: nn.Module) -> Tensor:
    """E_q[log q(w)] = -sum(log sigma + log(2 pi e) / 2) in nats; see :func:`kl_divergence`."""
    return _sum_over_tensors(model, _negative_entropy)


def log_prior(model: nn.Module) -> Tensor:
    """E_q[log p(w)] in nats: `log_variational_posterior(model) - kl_divergence(model)`."""
    return _sum_over_tensors(model, lambda tensor: _negative_entropy(tensor) - tensor_kl(tensor))


def tensor_kl(tensor: NamedVariational) -> Tensor:
    """KL(q || p) of one tensor, summed over its random weights: a scalar."""
    kl_watch.note(tensor.module)
    trained, centre, prior = _prior_of(tensor)
    p = prior(wide(trained.detach().reshape(-1)[:1], tensor.rho))
    if isinstance(p, EmpiricalNormal):  # the derivative in its best scale is 0, so the scale is a number here
        best = _best_scale(list(tensor.layer) if p.per == "layer" else [tensor])
        prior = functools.partial(_with_scale, prior, best)
    row, floor = tensor.spec.padding_idx, tensor.floor
    if isinstance(p, (DiagonalNormal, EmpiricalNormal)):
        stored = tensor.module.prior_scale(tensor.parameter_name)
        loc = tensor.loc.detach() if tensor.module.prior.follows_mean else tensor.loc
        return normal_kl(loc, tensor.rho, centre, prior, row, prior_scale=stored, floor=floor)
    if getattr(p, "separable", False) and has_closed_form(_EXAMPLE, p):

        def block_kl(loc: Tensor, rho: Tensor, centre: Tensor | None) -> Tensor:
            q = DiagonalNormal(loc, scale_of(loc, rho, floor))
            return _kl_divergence(q, prior(loc if centre is None else centre))

        return separable_kl(tensor.loc, tensor.rho, centre, block_kl, row)
    return _whole_kl(tensor, trained, centre is None, prior)


_EXAMPLE = DiagonalNormal(torch.zeros(1), torch.ones(1))


def _whole_kl(tensor: NamedVariational, trained: Tensor, is_own_centre: bool, prior: _Density) -> Tensor:
    """KL of a tensor in one piece: its density takes the weights together, or has no closed form."""

    def random(value: Tensor) -> Tensor:
        return torch.cat([value[rows] for rows in tensor.random_rows()])

    loc, rho, centre = map(random, (tensor.loc, tensor.rho, trained))
    q = DiagonalNormal(wide(loc, rho), scale_of(loc, rho, tensor.floor))
    p = prior(q.loc if is_own_centre else wide(centre, rho))
    noise = None
    if not has_closed_form(q, p):
        noise = random(sampled_noise(tensor))
    return _kl_divergence(q, p, noise)


def _prior_of(tensor: NamedVariational) -> tuple[Tensor, Tensor | None, _Density]:
    """The trained weights; again, but None where a frozen mean is its own centre; the density given a part of them."""
    module, name = tensor.module, tensor.parameter_name
    trained = module.prior_centre(name)
    is_own = module.prior.needs_centre or module.prior.follows_mean
    centre = None if is_own and trained is tensor.loc else trained
    initial = module.initial_scale(name, trained)
    if module.prior.follows_mean and tensor.floor is not None:  # the posterior's, which does not move with the means
        initial = replace(initial, floor=tensor.floor.to(initial.floor))
    return trained, centre, functools.partial(module.prior.for_tensor, initial=initial)


def _with_scale(prior: _Density, scale: Tensor, centre: Tensor) -> DiagonalNormal:
    """N(m, scale^2) with the m that ``prior`` has, given a part of the trained weights."""
    return DiagonalNormal(prior(centre).loc, scale)


@torch.no_grad()
def _best_scale(tensors: list[NamedVariational]) -> Tensor:
    """The s of the smallest KL to N(m, s^2) over all these tensors: s^2 = mean(sigma^2 + (mu - m)^2)."""
    moments, count = torch.zeros((), dtype=torch.float64, device=tensors[0].rho.device), 0
    for tensor in tensors:
        trained, centre, prior = _prior_of(tensor)
        for loc, rho, block in _blocks(tensor, tensor.loc, tensor.rho, trained):
            moment = scale_of(loc, rho, tensor.floor).square_()
            if centre is not None:
                moment += (loc - prior(wide(block, rho)).loc).square()
            moments, count = moments + moment.sum(), count + moment.numel()
    moments, count = summed_moment(tensors, moments, count)
    best: Tensor = (moments / max(count, 1)).sqrt().to(wide(tensors[0].loc, tensors[0].rho).dtype)
    return best


def _negative_entropy(tensor: NamedVariational) -> Tensor:
    kl_watch.note(tensor.module)
    half_log_2pie = 0.5 * math.log(2 * math.pi * math.e)
    logs, count = [torch.zeros((), dtype=wide(tensor.loc[:0], tensor.rho).dtype, device=tensor.rho.device)], 0
    for loc, rho in _blocks(tensor, tensor.loc, tensor.rho):  # it runs in every step's log
        logs.append(scale_of(loc, rho, tensor.floor).log().sum())
        count += rho.numel()
    return -torch.stack(logs).sum() - half_log_2pie * count


def _blocks(tensor: NamedVariational, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The random weights in flat blocks of a size that stays in cache, of all ``values`` together."""
    size = block_size(tensor.rho)
    for rows in tensor.random_rows():
        yield from zip(*(torch.split(value[rows].reshape(-1), size) for value in values), strict=True)


def _sum_over_tensors(model: nn.Module, function: Callable[[NamedVariational], Tensor]) -> Tensor:
    tensors = list(variational_tensors(model))
    if not tensors:
        raise ValueError(f"`model` ({type(model).__name__}) has no Bayesian layer; call `to_bayesian(model)` first.")
    reshard(model)
    active = own_parts(active_tensors(model))
    parts = [function(tensor) for tensor in active]
    if not parts:  # its adapters are disabled
        return torch.zeros((), dtype=wide(tensors[0].loc[:0], tensors[0].rho).dtype, device=tensors[0].rho.device)
    return total(active, parts)
