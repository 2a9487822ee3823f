"""Which posteriors are saved beside a model, and by which file a folder tells that it holds one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TypeVar

from torch import nn

from .base import BasePosterior
from .point import PointPosterior
from .variational import VariationalPosterior, is_bayesian

Kind = TypeVar("Kind", bound=type[BasePosterior])

_KINDS: dict[str, type[BasePosterior]] = {}
_ELSEWHERE = ("adapters.posterior", "laplace.posterior", "laplace.sparse.inf_posterior")
"""Modules of rooms above this one that register a posterior: loaded when a folder's file may be theirs."""


def register_posterior(kind: Kind) -> Kind:
    """Let `save_pretrained` write a class's posteriors beside their model, and `from_pretrained` read them again.

    A posterior that wraps others (its `wraps` is True) saves these beside its own file, and finds them again itself.

    Args:
        kind: the class; its `file_name` is the file that `save` writes and `load(path, model)` reads.

    Returns:
        The class: a decorator.

    Raises:
        ValueError: it names no file, or one that another class has.
    """
    name = kind.file_name
    if not name:
        raise ValueError(f"`kind` ({kind.__name__}) must name the file that it saves as `file_name`, got {name!r}.")
    known = _KINDS.get(name, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):  # the same, imported again, may
        raise ValueError(f"`file_name` {name!r} of {kind.__name__} is that of {known.__name__} already.")
    _KINDS[name] = kind
    return kind


def saved_kinds() -> dict[str, type[BasePosterior]]:
    """File name -> class, those that wrap others first: where both lie in a folder, the wrapper is the posterior."""
    return dict(sorted(_all_kinds().items(), key=lambda item: not item[1].wraps))


def _all_kinds() -> dict[str, type[BasePosterior]]:
    """Those of the whole package, whatever was imported of it, and those that others have registered."""
    for name in _ELSEWHERE:
        importlib.import_module(f"bayeformers.{name}")
    return _KINDS


def load_beside(directory: Path, name: str | None, model: nn.Module) -> BasePosterior:
    """Return what a posterior that wraps others saved of one of them.

    Args:
        directory: where that one was saved.
        name: its `file_name`; None: what the model is by itself, a converted one's posterior or a point estimate.
        model: its model.

    Raises:
        ValueError: no class of that name is registered, or the file is missing or damaged.
    """
    if name is None:
        return VariationalPosterior(model) if is_bayesian(model) else PointPosterior(model)
    if name not in _all_kinds():
        raise ValueError(f"No posterior is registered that saves {name!r}: import the module that registers it first.")
    return _KINDS[name].load(directory / name, model)


def check_model(posterior: BasePosterior, model: nn.Module, what: str) -> None:
    """Check that a posterior that is saved beside its model is of this one, or of a part of it.

    Args:
        posterior: the posterior.
        model: the model that it is given to.
        what: what it is, for the error.

    Raises:
        ValueError: it is of another model, whose predictions would be taken for this one's.
    """
    own = posterior.model
    is_related = any(part is own for part in model.modules()) or any(part is model for part in own.modules())
    if posterior.file_name is not None and not is_related:
        raise ValueError(
            f"{what} is a {type(posterior).__name__} of another model ({type(own).__name__}) than this "
            f"{type(model).__name__}: make it around this one, or use the posterior's own `model` here."
        )
