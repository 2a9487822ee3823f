r"""The formulas of IVON, on lists of tensors that are aligned with each other: one entry per parameter, or part of one.

Shen et al. 2024 (arXiv 2402.17641), Algorithm 1. With the mean m, the Hessian's estimate h, the weight decay delta, the
effective sample size lambda and sigma = 1 / sqrt(lambda (h + delta)), one step is

    theta = m + sigma eps,  eps ~ N(0, I)                                         line 2
    g_hat = gradient of the mean loss at theta                                    line 2
    h_hat = g_hat (theta - m) / sigma^2 = g_hat eps / sigma                       line 3
    g     = beta_1 g + (1 - beta_1) g_hat                                         line 4
    h     = beta_2 h + (1 - beta_2) h_hat + (1 - beta_2)^2 (h - h_hat)^2 / (2 (h + delta))   line 5
    m     = m - alpha (g / (1 - beta_1^t) + delta m) / (h + delta)                lines 6 and 7
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..sampling import philox
from ..sampling.generators import keyed_generator

Tensors = list[Tensor] | tuple[Tensor, ...]
"""One of each parameter."""

Aligned = tuple[Tensor, ...]
"""Tensors of one shape, on one device: a parameter's, or the same part of each of them."""

_CACHED, _WHOLE = 2**17, 2**26  # elements that are worked on together: what stays in a CPU's cache; a GPU's launches


@dataclass(frozen=True, kw_only=True)
class Step:
    """The numbers of one group's step.

    Attributes:
        lr: alpha, rescaled or not.
        ess: lambda.
        beta1: of the gradient's average.
        beta2: of the Hessian's average.
        weight_decay: delta.
        clip_radius: xi: every coordinate of the preconditioned gradient is cut to [-xi, xi]; infinite: none is.
    """

    lr: float
    ess: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_radius: float = math.inf


@dataclass
class Sums:
    """What the draws of one step have left, by parameter: sums of gradients, and of gradient times noise.

    Attributes:
        count: how many draws.
        gradients: of torch, which stand in ``grad`` between the draws.
        products: in the precision of the state.
    """

    count: int = 0
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    products: dict[nn.Parameter, Tensor] = field(default_factory=dict)


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of one group.

    Raises:
        ValueError: one that is not allowed.
    """
    check_number("lr", options["lr"], 0.0)
    if options["ess"] is not None:
        check_number("ess", options["ess"], 0.0, strict=True)
    check_number("hess_init", options["hess_init"], 0.0, strict=True)
    check_number("weight_decay", options["weight_decay"], 0.0)
    for name in ("beta1", "beta2"):
        check_number(name, options[name], 0.0, 1.0)
        if options[name] == 1.0:
            raise ValueError(f"`{name}` must be below 1, got {options[name]!r}.")
    if not isinstance(options["rescale_lr"], bool):
        raise ValueError(f"`rescale_lr` must be True or False, got {options['rescale_lr']!r}.")
    if options["clip_radius"] != math.inf:
        check_number("clip_radius", options["clip_radius"], 0.0, strict=True)


def step_of(group: Mapping[str, Any]) -> Step:
    """Return the numbers of a group's next step.

    Raises:
        ValueError: its ``ess`` is not known yet.
    """
    if group["ess"] is None:
        raise ValueError("`ess` is not known: give the number of training items, or train with `BayesianTrainer`.")
    lr = float(group["lr"])
    return Step(
        lr=lr * (group["hess_init"] + group["weight_decay"]) if group["rescale_lr"] else lr,
        ess=float(group["ess"]),
        beta1=group["beta1"],
        beta2=group["beta2"],
        weight_decay=group["weight_decay"],
        clip_radius=group["clip_radius"],
    )


def parts(tensors: Iterable[Aligned]) -> Iterator[list[Aligned]]:
    """Cut aligned tensors into views, and give as many of them at once as are quick to work on together.

    Args:
        tensors: of one device, dtypes may differ.

    Yields:
        Lists, one per place in the tuples, of views on the tensors: what is written to them is written there.
    """
    held: list[Aligned] = []
    size = 0
    for aligned in tensors:
        limit = _CACHED if aligned[0].device.type == "cpu" else _WHOLE
        for part in _cut(aligned, limit):
            if size + part[0].numel() > limit and held:
                yield list(zip(*held, strict=True))
                held, size = [], 0
            held.append(part)
            size += part[0].numel()
    if held:
        yield list(zip(*held, strict=True))


def _cut(aligned: Aligned, limit: int) -> Iterable[Aligned]:
    if aligned[0].numel() <= limit or not all(tensor.is_contiguous() for tensor in aligned):
        return [aligned]
    return zip(*(torch.split(tensor.view(-1), limit) for tensor in aligned), strict=True)


def normal(
    name: str, shapes: Iterable[torch.Size], device: torch.device, dtype: torch.dtype, noise_version: int
) -> Tensors:
    """Return N(0, 1) of every shape, cut from one stretch of random numbers.

    Args:
        name: of which the numbers are a function.
        shapes: of the results.
        device: of the results; before version 3 types of devices have numbers of their own.
        dtype: of the results.
        noise_version: how the numbers follow from the name, see `bayeformers.sampling.generators`.
    """
    shapes = list(shapes)
    sizes = [shape.numel() for shape in shapes]
    if noise_version >= 3:
        values = philox.normal(philox.key_of(name), (sum(sizes),), device).to(dtype)
    else:
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
        generator = keyed_generator(key, device, noise_version)
        values = torch.randn(sum(sizes), dtype=dtype, device=device, generator=generator)
    return [piece.view(shape) for piece, shape in zip(torch.split(values, sizes), shapes, strict=True)]


def scales(hessian: Tensors, ess: float, weight_decay: float) -> Tensors:
    """Return sigma = 1 / sqrt(lambda (h + delta)) of each tensor.

    Args:
        hessian: h.
        ess: lambda.
        weight_decay: delta.
    """
    return torch._foreach_reciprocal(_precision_roots(hessian, ess, weight_decay))


def draw(mean: Tensors, hessian: Tensors, noise: Tensors, step: Step) -> Tensors:
    """Return theta = m + sigma eps, line 2.

    Args:
        mean: m.
        hessian: h.
        noise: eps.
        step: the numbers lambda and delta.
    """
    roots = _precision_roots(hessian, step.ess, step.weight_decay)
    return torch._foreach_addcdiv(mean, noise, roots)


def update(
    mean: Tensors,
    momentum: Tensors,
    hessian: Tensors,
    gradient: Tensors,
    product: Tensors,
    step: Step,
    count: int,
) -> None:
    """Do lines 3 to 7 in place: momentum, Hessian, then the mean.

    Args:
        mean: m.
        momentum: g.
        hessian: h.
        gradient: g_hat.
        product: g_hat eps, averaged over what g_hat was averaged over; its memory is used.
        step: the numbers.
        count: t, from 1.
    """
    _update_hessian(hessian, product, step)
    torch._foreach_lerp_(momentum, gradient, 1 - step.beta1)
    move = torch._foreach_mul(momentum, 1 / (1 - step.beta1**count))
    if step.weight_decay:
        torch._foreach_add_(move, mean, alpha=step.weight_decay)
    torch._foreach_div_(move, torch._foreach_add(hessian, step.weight_decay))
    if math.isfinite(step.clip_radius):
        torch._foreach_clamp_max_(move, step.clip_radius)
        torch._foreach_clamp_min_(move, -step.clip_radius)
    torch._foreach_add_(mean, move, alpha=-step.lr)


def _update_hessian(hessian: Tensors, product: Tensors, step: Step) -> None:
    """Do lines 3 and 5, h + (1 - b) d + (1 - b)^2 d^2 / (2 (h + delta)) with d = h_hat - h: it stays above -delta."""
    curvature = torch._foreach_add(hessian, step.weight_decay)
    roots = torch._foreach_mul(curvature, step.ess)
    torch._foreach_sqrt_(roots)
    torch._foreach_mul_(product, roots)  # h_hat
    torch._foreach_sub_(product, hessian)
    torch._foreach_add_(hessian, product, alpha=1 - step.beta2)
    torch._foreach_mul_(product, product)
    torch._foreach_addcdiv_(hessian, product, curvature, value=0.5 * (1 - step.beta2) ** 2)


def _precision_roots(hessian: Tensors, ess: float, weight_decay: float) -> Tensors:
    """Return 1 / sigma."""
    roots = torch._foreach_add(hessian, weight_decay)
    torch._foreach_mul_(roots, ess)
    torch._foreach_sqrt_(roots)
    return roots
