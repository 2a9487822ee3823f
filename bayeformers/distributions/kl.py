"""KL(q || p) by the types of q and p: closed form where one is registered, one Monte-Carlo draw otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .diagonal_normal import DiagonalNormal
from .gaussian_priors import ARDNormal, EmpiricalNormal
from .heavy_tailed import DoubleExponential, LogUniform, ScaleMixture
from .log_moment import log_moment
from .prior import PriorDistribution

_KL: dict[tuple[type, type], Callable[..., Tensor]] = {}

KL = Callable[[Any, Any], Tensor]


def register_kl(posterior: type, prior: type) -> Callable[[KL], KL]:
    """Return a decorator: ``f(q, p)`` gives KL(q || p), summed over the weights, for these two types.

    As ``torch.distributions.kl.register_kl``; a subclass finds the entry of its nearest base.
    """

    def register(function: KL) -> KL:
        _KL[posterior, prior] = function
        return function

    return register


def has_closed_form(q: DiagonalNormal, p: PriorDistribution) -> bool:
    """Whether :func:`kl_divergence` needs no ``noise`` for this pair."""
    return _find(type(q), type(p)) is not None and not (isinstance(p, ScaleMixture) and p.quadrature is None)


def kl_divergence(q: DiagonalNormal, p: PriorDistribution, noise: Tensor | None = None) -> Tensor:
    """Return KL(q || p) = E_q[log q - log p] in nats, summed over the weights, never averaged: a scalar with gradient.

    A pair without a registered closed form gives the unbiased one-draw estimate -H[q] - log p(loc + scale * noise)
    (Blundell et al. 2015, eq. 2, with the first term exact).

    Args:
        q: the variational posterior.
        p: the prior; anything with ``log_prob``.
        noise: N(0, 1) of the shape of ``q.loc``, used by the estimate only.

    Raises:
        ValueError: no closed form is registered for the pair and ``noise`` is None.

    >>> q = DiagonalNormal(torch.zeros(3), torch.ones(3))
    >>> kl_divergence(q, DiagonalNormal(torch.ones(3), torch.ones(3)))
    tensor(1.5000)
    """
    if has_closed_form(q, p):
        function = _find(type(q), type(p))
        assert function is not None
        return function(q, p)
    if noise is None:
        raise ValueError(
            f"`noise` is needed: KL({type(q).__name__} || {type(p).__name__}) has no closed form. "
            "Give N(0, 1) values of the shape of `q.loc`, or register one with `register_kl`."
        )
    return -q.entropy() - p.log_prob(q.rsample(noise)).sum()


def _find(posterior: type, prior: type) -> Callable[..., Tensor] | None:
    for q in posterior.__mro__:
        for p in prior.__mro__:
            if (q, p) in _KL:
                return _KL[q, p]
    return None


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_normal_normal(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    """Sum of log(s / sigma) + (sigma^2 + (mu - m)^2) / (2 s^2) - 1/2."""
    ratio = q.scale / p.scale
    kl = 0.5 * (ratio.square() - 1) - ratio.log()
    if p.loc is not q.loc:  # a frozen mean is its own prior centre: nothing to add
        kl = kl + 0.5 * ((q.loc - p.loc) / p.scale).square()
    return kl.sum()


@register_kl(DiagonalNormal, EmpiricalNormal)
def _kl_normal_empirical(q: DiagonalNormal, p: EmpiricalNormal) -> Tensor:
    """(D/2) log s^2 - sum(log sigma) at the best s^2 = mean(sigma^2 + (mu - m)^2): the other terms cancel."""
    variance = p.best_scale(q).square()
    return 0.5 * q.loc.numel() * variance.log() - q.scale.expand_as(q.loc).log().sum()


@register_kl(DiagonalNormal, ScaleMixture)
def _kl_normal_mixture(q: DiagonalNormal, p: ScaleMixture) -> Tensor:
    """E_q[log p] by Gauss-Hermite quadrature per weight, `p.quadrature` nodes."""
    assert p.quadrature is not None
    nodes, weights = _gauss_hermite(p.quadrature)
    expected = torch.zeros((), dtype=q.loc.dtype, device=q.loc.device)
    for node, weight in zip(nodes, weights, strict=True):
        expected = expected + weight * p.log_prob(q.loc + q.scale * node).sum()
    return -q.entropy() - expected


def _gauss_hermite(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of E[f(z)], z ~ N(0, 1) (probabilists' Hermite; Golub and Welsch 1969)."""
    off_diagonal = torch.arange(1, count, dtype=torch.float64).sqrt()
    jacobi = torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(jacobi)
    weights = vectors[0].square()
    assert math.isclose(float(weights.sum()), 1.0)
    return nodes.tolist(), weights.tolist()


@register_kl(DiagonalNormal, ARDNormal)
def _kl_normal_ard(q: DiagonalNormal, p: ARDNormal) -> Tensor:
    """Sum of log(1 + mu^2 / sigma^2) / 2, at every weight's best s^2 = mu^2 + sigma^2."""
    return 0.5 * (q.loc / q.scale).square().log1p().sum()


@register_kl(DiagonalNormal, DoubleExponential)
def _kl_normal_double_exponential(q: DiagonalNormal, p: DoubleExponential) -> Tensor:
    """Return the sum of log(2 b) + E|w - m| / b, less H[q]; d = mu - m.

    E|w - m| = sigma sqrt(2 / pi) exp(-d^2 / (2 sigma^2)) + d erf(d / (sigma sqrt 2)): the folded Gaussian's mean.
    """
    folded = math.sqrt(2 / math.pi) * q.scale
    if p.loc is not q.loc:
        shift = q.loc - p.loc
        standardised = shift / q.scale
        folded = folded * (-0.5 * standardised.square()).exp() + shift * torch.erf(standardised / math.sqrt(2))
    return (folded / p.scale + (2 * p.scale).log()).expand_as(q.loc).sum() - q.entropy()


@register_kl(DiagonalNormal, LogUniform)
def _kl_normal_log_uniform(q: DiagonalNormal, p: LogUniform) -> Tensor:
    """Sum of E log|mu / sigma + z| - E log|z|: exact, where Molchanov et al. 2017 (equation 14) fit a sigmoid to it."""
    return log_moment(q.loc / q.scale).sum()
