"""Says once that a training has no KL: another Trainer than ours, or a loop by hand, may leave it out.

A layer cannot see the loss that it is trained on. So a KL (or log density) that is computed with a gradient leaves a
mark on its layers, and every optimizer step that is about to move a scale looks for one since its last step.
"""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

logger = logging.getLogger(__name__)

PATIENCE = 3
"""Steps without a KL of a loop by hand, which may take turns between its terms; a Trainer's first one tells."""

_MARK = "_kl_computed_at"
_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_said: weakref.WeakSet[Any] = weakref.WeakSet()
_clock = 0
_registered = 0
_hook: Any = None


@dataclass
class _Watched:
    """What an optimizer holds of Bayesian layers; found anew when its parameters or the layers change."""

    stamp: tuple[int, int]
    layers: list[weakref.ref[nn.Module]] = field(default_factory=list)
    since: int = 0
    missing: int = 0
    said: bool = False


_optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Watched] = weakref.WeakKeyDictionary()


def watch(layer: nn.Module) -> None:
    """``layer`` has become Bayesian, or is a copy of one that is."""
    global _hook, _registered
    _layers.add(layer)
    _registered += 1
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def unwatch(layer: nn.Module) -> None:
    """``layer`` is deterministic again."""
    global _registered
    _layers.discard(layer)
    _registered += 1


def note(layer: nn.Module) -> None:
    """A KL or log density of ``layer`` is being computed; it counts if a loss can be made of it."""
    if torch.is_grad_enabled():
        layer.__dict__[_MARK] = _clock


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _clock
    if torch.compiler.is_compiling() or not (watched := _watched(optimizer)).layers:
        return
    layers = [layer for layer in (reference() for reference in watched.layers) if layer is not None]
    if any(layer.__dict__.get(_MARK, -1) >= watched.since for layer in layers):
        watched.missing = 0
    elif not watched.said and any(_has_gradient(layer) for layer in layers):
        watched.missing += 1
        trainer = _driver()
        if watched.missing >= (PATIENCE if trainer is None else 1):
            watched.said = True
            _say(layers, trainer)
    _clock += 1
    watched.since = _clock


def _watched(optimizer: torch.optim.Optimizer) -> _Watched:
    stamp = _registered, sum(len(group["params"]) for group in optimizer.param_groups)
    known = _optimizers.get(optimizer)
    if known is not None and known.stamp == stamp:
        return known
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [weakref.ref(layer) for layer in _layers if any(id(rho) in held for rho in _scales(layer))]
    found = _Watched(stamp, layers) if known is None else replace(known, stamp=stamp, layers=layers)
    _optimizers[optimizer] = found
    return found


def _scales(layer: nn.Module) -> list[nn.Parameter]:
    named = ((name, layer._parameters.get(f"{name}_rho")) for name in getattr(layer, "specs", ()))
    return [rho for _, rho in named if rho is not None]


def _has_gradient(layer: nn.Module) -> bool:
    """Noise reached the loss; a scale that no forward used, or a model at its mean, has none."""
    return any(rho.grad is not None for rho in _scales(layer))


def _driver() -> str | None:
    """The class of the transformers Trainer that calls the optimizer; None in any other loop."""
    module: Any = sys.modules.get("transformers.trainer")
    frame = None if module is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == module.__file__:  # reading another frame's `f_locals` keeps its objects alive
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.Trainer):
                return type(owner).__name__
        frame = frame.f_back
    return None


def _say(layers: list[nn.Module], trainer: str | None) -> None:
    scopes = {id(scope): scope for scope in (getattr(layer, "scope", None) for layer in layers) if scope is not None}
    is_new = not any(scope in _said for scope in scopes.values())
    for scope in scopes.values():
        _said.add(scope)
    if is_new:
        logger.warning(
            "%s trains a Bayesian model without its KL: by such a loss the scales vanish, and no prior holds the "
            "means. Use `bayeformers.training.BayesianTrainer`, or add `kl_divergence(model) / N` to the loss, with N "
            "the number of training items.",
            "This loop" if trainer is None else f"`{trainer}`",
        )
