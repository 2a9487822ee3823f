"""The record of a conversion: kept on the model, published in its configuration, found through wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ..nn import draws
from ..nn.base import RECORD, is_bayesian, record_of
from .config import BayesianConfig


@dataclass
class Conversion:
    """What :func:`to_deterministic` needs to restore, and what :func:`summary` tells; kept on the model."""

    is_shared_by_views: ClassVar[bool] = True

    config: BayesianConfig
    requires_grad: dict[str, bool]
    skipped: dict[str, str] = field(default_factory=dict)
    declared_ties: dict[str, str] = field(default_factory=dict)
    fused: list[tuple[nn.Module, str, Any]] = field(default_factory=list)


def conversion_record(model: nn.Module) -> Conversion | None:
    """The record of a model's conversion, found through wrappers; None for a network that was built by hand."""
    record: Conversion | None = record_of(model)
    return record


def conversion_of(model: nn.Module) -> Conversion:
    """Return the record of a model's conversion, found through wrappers.

    Raises:
        ValueError: ``model`` is not Bayesian, or was built by hand.
    """
    state: Conversion = getattr(converted_module(model), RECORD)
    return state


def converted_module(model: nn.Module) -> nn.Module:
    """Return the module that :func:`to_bayesian` was called with: ``model`` or one inside it.

    Raises:
        ValueError: ``model`` is not Bayesian, or was built by hand.
    """
    draws.check_module(model)
    for module in model.modules():
        if RECORD in vars(module):  # a `PeftModel` has its base's attributes too
            return module
    if is_bayesian(model):
        raise ValueError(
            f"`model` ({type(model).__name__}) was built by hand from `bayeformers.nn` layers: it has no record of a "
            "conversion by `to_bayesian`."
        )
    raise ValueError(not_bayesian(model))


def not_bayesian(model: nn.Module) -> str:
    """What to say of a model without a Bayesian layer."""
    return f"`model` ({type(model).__name__}) is not Bayesian; call `to_bayesian(model)` first."


def bayesian_config(model: nn.Module) -> BayesianConfig:
    """Return the configuration of a converted model; the same that its `config.json` records.

    Raises:
        ValueError: ``model`` is not Bayesian, or was built by hand.
    """
    return conversion_of(model).config


def update_config(model: nn.Module, **changes: Any) -> BayesianConfig | None:
    """Return the configuration after ``changes``, such as ``num_training_items``, are on the model and its config.

    None, and nothing done, for a network that was built by hand: it has no record.
    """
    if conversion_record(model) is None:
        return None
    module = converted_module(model)
    state = conversion_of(module)
    state.config = replace(state.config, **changes)
    publish(module, state.config)
    return state.config


def publish(model: nn.Module, config: BayesianConfig) -> None:
    """Put the record where `config.json` is written from, if the model has a configuration."""
    if hasattr(model, "config") and not isinstance(model.config, dict):
        model.config.bayesian = config.to_dict()  # type: ignore[union-attr]


@contextlib.contextmanager
def without_stale_record(model: nn.Module) -> Iterator[None]:
    """While an unconverted model is saved: its config without the record of a conversion.

    Models that were made from one config object share it, so another one's conversion may stand there; and the mean of
    a converted checkpoint, loaded by transformers alone, brings the record along.
    """
    config = getattr(model, "config", None)
    stale = None if conversion_record(model) is not None else getattr(config, "bayesian", None)
    if config is None or stale is None:
        yield
        return
    del config.bayesian
    try:
        yield
    finally:
        config.bayesian = stale
