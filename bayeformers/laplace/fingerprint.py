"""Which weights a posterior was fitted to: hashes of their values, in their own precision and in narrower ones.

A model that is loaded in fewer bits has other values, which rounding determines: hashes of the rounded weights are
kept beside those of the weights themselves, so that every precision is recognised and no other weights pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..storage import digest
from .targets import Target

_NARROWER = (torch.float32, torch.bfloat16, torch.float16)
Fingerprint = Mapping[str, Mapping[str, str]]
"""Name of a parameter -> dtype -> digest of its values in it; its own dtype is the first."""


def fingerprint(target: Target) -> dict[str, dict[str, str]]:
    """Of a layer's covered parameters as they are now."""
    return {name: _of(parameter.detach()) for name, parameter in target.parameters.items()}


def fingerprints_of(targets: Iterable[Target]) -> dict[str, Fingerprint]:
    """Of every layer, by its name."""
    return {target.name: fingerprint(target) for target in targets}


def is_of(target: Target, recorded: Fingerprint) -> bool:
    """Whether the layer's parameters are those recorded, or those rounded to fewer bits or copied into more."""
    return recorded.keys() == target.parameters.keys() and all(
        _matches(parameter.detach(), recorded[name]) for name, parameter in target.parameters.items()
    )


def recorded_layers(targets: Iterable[Target], fitted: Mapping[str, Fingerprint]) -> dict[str, dict[str, Any]]:
    """What a file says about the layers of a posterior; ``fitted`` are their fingerprints at the fit.

    Raises:
        ValueError: the weights have moved since.
    """
    targets = list(targets)
    moved = [target.name for target in targets if not is_of(target, fitted[target.name])]
    if moved:
        raise ValueError(
            f"The model's weights are not those that the posterior was fitted to: {moved[:3]} ({len(moved)}) have "
            "moved since (training, or a draw that is held). Fit again, or save outside the draw."
        )
    return {
        target.name: {
            "parameters": list(target.parameters),
            "squared_norm": target.squared_norm,
            "digests": fingerprint(target),
            "padding_idx": getattr(target.modules[0], "padding_idx", None),
        }
        for target in targets
    }


def set_padding(targets: Iterable[Target], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the tables the recorded padding rows: a configuration whose padding id was changed has built others."""
    for target in targets:
        module, recorded = target.modules[0], layers[target.name]
        if hasattr(module, "padding_idx") and "padding_idx" in recorded:
            module.padding_idx = recorded["padding_idx"]


def check_weights(targets: Iterable[Target], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Of a saved posterior's ``layers``; those of earlier versions have no "digests", and pass.

    Raises:
        ValueError: the model's weights are not those that the posterior was fitted to.
    """
    for target in targets:
        recorded = layers[target.name].get("digests")
        if recorded is not None and not is_of(target, recorded):
            raise ValueError(
                f"The posterior was fitted to other weights: those of {target.name!r} in the model are not the ones "
                "that were saved with it. Load the model that it was fitted to, or fit again."
            )


def _of(values: Tensor) -> dict[str, str]:
    own = values.dtype
    if values.is_meta:
        return {}
    others = [dtype for dtype in _NARROWER if dtype != own and dtype.itemsize <= own.itemsize]
    return {_name(own): digest(values), **{_name(dtype): digest(values.to(dtype)) for dtype in others}}


def _matches(values: Tensor, recorded: Mapping[str, str]) -> bool:
    if values.is_meta:
        return True
    known = recorded.get(_name(values.dtype))
    if known is not None:
        return digest(values) == known
    own = getattr(torch, next(iter(recorded)))  # fewer bits than these values have: nothing may be lost
    narrow = values.to(own)
    return torch.equal(narrow.to(values.dtype), values) and digest(narrow) == recorded[_name(own)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
