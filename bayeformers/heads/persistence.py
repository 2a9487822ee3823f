"""A head that is saved and read with its model: its record, and a class that builds the model with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .base import Replaced
from .config import HeadConfig, head_config
from .find import RECORD, find_head, find_linear, head_of
from .replace import install

__all__ = ["building", "recorded_head", "settle", "without_stale_head"]


def recorded_head(config: Any) -> HeadConfig | None:
    """Read which head a model's configuration records.

    Returns:
        The head's configuration; None if there is no record.

    Raises:
        ValueError: a record that is damaged, or of a newer version.
    """
    record = getattr(config, RECORD, None)
    if record is None:
        return None
    if not isinstance(record, Mapping) or not isinstance(record.get("module"), str):
        raise ValueError(f"The configuration's {RECORD!r} entry names no layer: it is damaged, got {record!r}.")
    if not isinstance(record.get("is_regression"), bool):
        raise ValueError(f"The configuration's {RECORD!r} entry does not say `is_regression`: it is damaged.")
    return head_config(record)


def building(original: type[PreTrainedModel], settled: HeadConfig) -> type[PreTrainedModel]:
    """A transient subclass whose `__init__` replaces the head, so that the stock loader fills it.

    Args:
        original: the model's class.
        settled: of the head.

    Returns:
        The subclass, of the same name.
    """

    class Building(original):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            record = dict(getattr(config, RECORD))
            name = find_linear(self, record["module"])
            regresses, freezes = record["is_regression"], bool(record.get("freeze"))
            head = install(self, name, settled, is_regression=regresses, freeze=freezes)
            kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
            self._keep_in_fp32_modules_strict = {*kept, *(f"{name}.{key}" for key in head.state_dict())}

    Building.__name__, Building.__qualname__ = original.__name__, original.__qualname__
    Building.__module__ = original.__module__
    return Building


def settle(model: nn.Module, original: type[PreTrainedModel]) -> None:
    """After the loader: the model is of its own class, and there is no former layer to go back to.

    Its tensors are copied to aligned memory, where products give the same bits as before the file.

    Args:
        model: as `building`'s class was loaded.
        original: its class.
    """
    model.__class__ = original
    model._apply(torch.clone)  # type: ignore[no-untyped-call]
    head = head_of(model)
    head.replaced = Replaced(None, head.replaced.requires_grad)


@contextlib.contextmanager
def without_stale_head(model: nn.Module) -> Iterator[None]:
    """While a model without such a head is saved: its config without the record of one, which it was loaded with."""
    config = getattr(model, "config", None)
    stale = getattr(config, RECORD, None) if find_head(model) is None else None
    if config is None or stale is None:
        yield
        return
    delattr(config, RECORD)
    try:
        yield
    finally:
        setattr(config, RECORD, stale)
