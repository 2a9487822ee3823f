"""The KL term of the ELBO over a whole model, and its two parts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions import DiagonalNormal, EmpiricalNormal
from ..distributions import kl_divergence as _kl_divergence
from ..distributions.kl import has_closed_form
from ..distributions.normal_kl import block_size, normal_kl
from ..distributions.separable_kl import separable_kl
from . import draws, kl_watch
from .base import NamedVariational, record_of, variational_tensors
from .variational import scale_of, wide

THAWED = (
    "The mean {!r} of this %s trains, though the conversion froze the means: PEFT's `set_adapter` and "
    "`disable_adapter` set `requires_grad`, for one. Freeze it again, or call `bayeformers.unfreeze(model)` if "
    "training is meant."
)


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
    draws.check_module(model)
    _tell_of_thawed(model)
    return _sum_over_tensors(model, tensor_kl)


def _tell_of_thawed(model: nn.Module) -> None:
    """Means that train though the conversion froze them; a prior that needs a centre refuses them by itself."""
    record = record_of(model)
    if record is None or not record.config.freeze:
        return
    thawed = next((tensor for tensor in variational_tensors(model) if tensor.loc.requires_grad), None)
    if thawed is not None:
        draws.say_once(thawed.module.scope, THAWED.format(thawed.name.replace("%", "%%")), model)


def log_variational_posterior(model: nn.Module) -> Tensor:
    """E_q[log q(w)] = -sum(log sigma + log(2 pi e) / 2) in nats; see :func:`kl_divergence`."""
    return _sum_over_tensors(model, _negative_entropy)


def log_prior(model: nn.Module) -> Tensor:
    """E_q[log p(w)] in nats: `log_variational_posterior(model) - kl_divergence(model)`."""
    return _sum_over_tensors(model, lambda tensor: _negative_entropy(tensor) - tensor_kl(tensor))


def tensor_kl(tensor: NamedVariational) -> Tensor:
    """KL(q || p) of one tensor, summed over its random weights: a scalar."""
    kl_watch.note(tensor.module)
    trained, prior = _trained(tensor), _prior_of(tensor)
    own_centre = _is_own_centre(tensor, trained)
    p = prior(wide(trained.detach().reshape(-1)[:1], tensor.rho))
    stored = tensor.module.prior_scale(tensor.parameter_name)
    if isinstance(p, EmpiricalNormal):  # the derivative in its best scale is 0, so the scale is a number here
        best = _best_scale(list(tensor.layer) if p.per == "layer" else [tensor])
        prior = functools.partial(_with_scale, prior, best)
    if isinstance(p, (DiagonalNormal, EmpiricalNormal)):
        return normal_kl(
            tensor.loc,
            tensor.rho,
            None if own_centre else trained,
            prior,
            tensor.spec.padding_idx,
            prior_scale=stored,
            floor=tensor.floor,
        )
    if getattr(p, "separable", False) and has_closed_form(_EXAMPLE, p):
        block = functools.partial(_block_kl, prior, tensor.floor)
        return separable_kl(tensor.loc, tensor.rho, None if own_centre else trained, block, tensor.spec.padding_idx)
    loc, rho, centre = (
        torch.cat([value[r] for r in tensor.random_rows()]) for value in (tensor.loc, tensor.rho, trained)
    )
    q = DiagonalNormal(wide(loc, rho), scale_of(loc, rho, tensor.floor))
    p = prior(q.loc if own_centre else wide(centre, rho))
    if has_closed_form(q, p):
        return _kl_divergence(q, p)
    noise = tensor.module.scope.sampling_key().noise(tensor.spec, tensor.loc)
    return _kl_divergence(q, p, torch.cat([noise[r] for r in tensor.random_rows()]))


_EXAMPLE = DiagonalNormal(torch.zeros(1), torch.ones(1))


def _block_kl(
    prior: Callable[[Tensor], Any], floor: Tensor | None, loc: Tensor, rho: Tensor, centre: Tensor | None
) -> Tensor:
    q = DiagonalNormal(loc, scale_of(loc, rho, floor))
    return _kl_divergence(q, prior(loc if centre is None else centre))


def _trained(tensor: NamedVariational) -> Tensor:
    """Centre of the prior, if it needs one."""
    return tensor.module.prior_centre(tensor.parameter_name)


def _is_own_centre(tensor: NamedVariational, trained: Tensor) -> bool:
    """Whether a frozen mean is its own prior's centre."""
    return tensor.module.prior.needs_centre and trained is tensor.loc


def _prior_of(tensor: NamedVariational) -> Callable[[Tensor], Any]:
    """The density of a part of the tensor, given its trained weights."""
    initial = tensor.module.initial_scale(tensor.parameter_name, _trained(tensor))
    return functools.partial(tensor.module.prior.for_tensor, initial=initial)


def _with_scale(prior: Callable[[Tensor], EmpiricalNormal], scale: Tensor, centre: Tensor) -> DiagonalNormal:
    """N(m, scale^2)."""
    return DiagonalNormal(prior(centre).loc, scale)


@torch.no_grad()
def _best_scale(tensors: list[NamedVariational]) -> Tensor:
    """s of the smallest KL to N(m, s^2) over all these tensors: s^2 = mean(sigma^2 + (mu - m)^2)."""
    total, count = torch.zeros((), dtype=torch.float64, device=tensors[0].rho.device), 0
    for tensor in tensors:
        trained, prior = _trained(tensor), _prior_of(tensor)
        for loc, rho, centre in _blocks(tensor, tensor.loc, tensor.rho, trained):
            moment = scale_of(loc, rho, tensor.floor).square_()
            if not _is_own_centre(tensor, trained):
                moment += (loc - prior(wide(centre, rho)).loc).square()
            total, count = total + moment.sum(), count + moment.numel()
    best: Tensor = (total / max(count, 1)).sqrt().to(wide(tensors[0].loc, tensors[0].rho).dtype)
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
    parts = [function(tensor) for tensor in variational_tensors(model)]
    if not parts:
        raise ValueError(f"`model` ({type(model).__name__}) has no Bayesian layer; call `to_bayesian(model)` first.")
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
