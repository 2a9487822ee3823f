r"""Spectral normalisation by projection: after a step, W <- W min(1, c / |W|_2) in place (SNGP's Algorithm 1).

The weight stays the Parameter that it is: no reparameterisation, no other name in a checkpoint, and ties hold. |W|_2 is
the limit of power iteration, v <- W^T W v / |W^T W v|, which goes on where the last one stopped; v is a buffer of the
head, so that a resumed training takes the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..likelihoods import unwrapped
from ..patterns import matching
from .sngp import RandomFeatureHead

__all__ = ["check_spectral_layers", "project_spectra", "spectral_layers", "spectral_norm"]

_MOST, _SETTLED = 100, 1e-6
_KINDS = (nn.Linear, Conv1D)


@torch.no_grad()
def spectral_norm(weight: Tensor, direction: Tensor) -> Tensor:
    """Estimate |W|_2 by power iteration, from below, until it changes by less than 1e-6 of itself (at most 100 times).

    Args:
        weight: W, (m, n).
        direction: v, (n,), where the iteration starts; it is overwritten with where it ends.

    Returns:
        The norm, a scalar.

    >>> spectral_norm(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2))
    tensor(3.0000)
    """
    matrix = weight.to(direction.dtype)
    norm = matrix.new_zeros(())
    for _ in range(_MOST):
        direction.div_(direction.norm().clamp_min(torch.finfo(direction.dtype).tiny))
        image = matrix @ direction
        last, norm = norm, image.norm()
        direction.copy_(matrix.mT @ image)
        if bool((norm - last).abs() <= _SETTLED * norm):
            break
    return norm


@torch.no_grad()
def project_spectra(model: nn.Module, head: RandomFeatureHead) -> None:
    """Scale every layer that the head names to a spectral norm of at most `spectral_bound`; frozen ones stay.

    Args:
        model: the model of the head.
        head: with the names of the layers and their directions.

    Raises:
        ValueError: a layer is not there any more, or is no Linear now.
    """
    bound = head.config.spectral_bound
    for i, layer in enumerate(_layers(model, head.config.spectral_layers)):
        if bound is not None and layer.weight.requires_grad:
            norm = spectral_norm(layer.weight, getattr(head, f"direction_{i}"))
            layer.weight.mul_((bound / norm.clamp_min(bound)).to(layer.weight.dtype))


def check_spectral_layers(model: nn.Module, head: RandomFeatureHead) -> None:
    """Raise ValueError where a layer that the head names is not there any more, or is no Linear now."""
    list(_layers(model, head.config.spectral_layers))


def _layers(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Linear]:
    modules = dict(unwrapped(model).named_modules())
    for name in names:
        layer = modules.get(name)
        if type(layer) not in _KINDS:
            found = "not there" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(
                f"`spectral_layers` names {name!r}, which is {found} now: leave it as it is, or out of `layers`."
            )
        yield cast(nn.Linear, layer)  # or a Conv1D, whose weight is the transpose


def spectral_layers(model: nn.Module, patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the full names of the layers to normalise, in the model's order.

    Args:
        model: the model, of transformers.
        patterns: as PEFT's `target_modules`; None: the Linear layers between the encoder's stack and the head, such as
            BERT's pooler.

    Raises:
        ValueError: a pattern matches nothing, or a layer that is no Linear.
    """
    linears = [name for name, module in model.named_modules() if type(module) in _KINDS]
    if patterns is None:
        base = f"{getattr(model, 'base_model_prefix', '')}."
        return tuple(name for name in linears if "pooler" in name.split(".") or not name.startswith(base))
    named = matching((name for name, _ in model.named_modules()), patterns, "spectral_layers")
    wrong = sorted(named - set(linears))
    if wrong:
        raise ValueError(f"`spectral_layers` must match Linear layers only, got {wrong[:3]} ({len(wrong)}).")
    return tuple(name for name in linears if name in named)
