"""Which weights matter: their signal-to-noise ratios, and removing those of the lowest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import is_real
from ..distributions import MIN_SCALE, rho_from_scale
from ..nn.base import NamedVariational, variational_tensors
from .rollback import all_or_nothing


@torch.no_grad()
def signal_to_noise(model: nn.Module) -> dict[str, Tensor]:
    """|mu| / sigma of every Bayesian weight: how far the posterior holds it from zero, in its own standard deviations.

    Blundell et al. 2015 (arXiv 1505.05424), section 5.1. In decibels: ``20 * snr.log10()``. A weight at zero has ratio
    0; a padding row is not random and has ratio infinity.

    Args:
        model: converted by :func:`~bayeformers.to_bayesian`; nothing in it changes.

    Returns:
        By the tensor's name, each distinct Parameter once (a tied one under its first owner): its shape, in float32 or
        the wider dtype of the means.

    Raises:
        ValueError: ``model`` has no Bayesian layer.

    >>> from bayeformers import to_bayesian
    >>> net = to_bayesian(nn.Linear(3, 2), delta=0.1)        # sigma = 0.1 |mu|, but for the smallest means
    >>> {name: float(ratio.median()) for name, ratio in signal_to_noise(net).items()}
    {'weight': 10.0, 'bias': 10.0}
    """
    tensors = list(variational_tensors(model))
    if not tensors:
        raise ValueError(f"`model` ({type(model).__name__}) has no Bayesian layer; call `to_bayesian(model)` first.")
    return {tensor.name: _ratio(tensor) for tensor in tensors}


@torch.no_grad()
def prune(model: nn.Module, share: float) -> nn.Module:
    """Remove the weights of the lowest signal-to-noise ratio, in place: mean 0, scale at its floor of 1e-8.

    Of all random weights in tensors of two or more axes together, round(share * their number) are removed, whichever
    tensor they are in; biases and other vectors stay. Every draw then has them at zero but for that floor, and the
    result is saved and loaded as any other. Ratios of 0 come first, so pruning in steps removes the same weights as
    pruning at once. For prediction: the KL of a removed weight is large, and training on would bring it back.
    Blundell et al. 2015 (arXiv 1505.05424), section 5.1, table 2.

    Args:
        model: converted by :func:`~bayeformers.to_bayesian`.
        share: of those weights, in [0, 1).

    Returns:
        The same object.

    Raises:
        TypeError: ``share`` is not a number.
        ValueError: ``share`` is out of its range, or ``model`` has no random matrix.

    >>> from bayeformers import to_bayesian
    >>> net = prune(to_bayesian(nn.Linear(10, 10)), 0.75)
    >>> int((net.weight == 0).sum()), int((net.bias == 0).sum())
    (75, 0)
    """
    share = _check_share(share)
    ratios = signal_to_noise(model)
    tensors = [tensor for tensor in variational_tensors(model) if tensor.loc.dim() > 1]
    if not tensors:
        raise ValueError(f"`model` ({type(model).__name__}) has no random tensor of two or more axes to prune.")
    flat = torch.cat([ratios[tensor.name].flatten().cpu() for tensor in tensors])
    removed = torch.zeros(flat.numel(), dtype=torch.bool)
    removed[flat.argsort(stable=True)[: round(share * _random_count(tensors))]] = True
    parts = torch.split(removed, [tensor.loc.numel() for tensor in tensors])
    with all_or_nothing(model, [value for tensor in tensors for value in (tensor.loc, tensor.rho)]):
        for tensor, part in zip(tensors, parts, strict=True):
            _remove(tensor, part.view(tensor.loc.shape).to(tensor.loc.device))
    return model


def _ratio(tensor: NamedVariational) -> Tensor:
    ratio = tensor.loc.abs() / tensor.scale()
    if tensor.spec.padding_idx is not None:
        ratio[tensor.spec.padding_idx] = torch.inf
    return ratio


def _random_count(tensors: list[NamedVariational]) -> int:
    return sum(tensor.loc[rows].numel() for tensor in tensors for rows in tensor.random_rows())


def _remove(tensor: NamedVariational, where: Tensor) -> None:
    """A multiplicative scale there is its floor's, for the mean is 0: 1e-8 times that."""
    tensor.loc.masked_fill_(where, 0.0)
    tensor.rho.masked_fill_(where, float(rho_from_scale(torch.tensor(MIN_SCALE, dtype=torch.float64))))


def _check_share(share: float) -> float:
    if not is_real(share):
        raise TypeError(f"`share` must be a number in [0, 1), got {share!r}.")
    if not (math.isfinite(share) and 0 <= share < 1):
        raise ValueError(f"`share` must lie in [0, 1), got {share!r}: 0.9 removes 90 % of the weights.")
    return float(share)
