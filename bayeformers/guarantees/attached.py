"""Prediction sets and intervals that go with their model, as its abstention policy does; and the files of all three."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .intervals import INTERVALS_FILE, PredictionIntervals
from .policy import POLICY_FILE
from .saving import take_up_policy, weights_digest, write_policy
from .sets import SETS_FILE, PredictionSets

__all__ = ["attach_sets", "sets_of", "take_up_guarantees", "write_guarantees"]

logger = logging.getLogger(__name__)

Sets = PredictionSets | PredictionIntervals

_OWN = "prediction_sets"
_FILES: dict[str, type[Sets]] = {SETS_FILE: PredictionSets, INTERVALS_FILE: PredictionIntervals}


def attach_sets(model: nn.Module, sets: Sets | None) -> None:
    """Let a model carry prediction sets or intervals: `save_pretrained` writes them, `from_pretrained` reads them.

    Args:
        model: the model, or a PEFT model.
        sets: of this model; None takes them away.

    Raises:
        TypeError: no module, or no sets.
        ValueError: they were fitted to other weights.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if sets is None:
        vars(model).pop(_OWN, None)
        return
    if not isinstance(sets, Sets):
        raise TypeError(f"`sets` must be PredictionSets, PredictionIntervals or None, got {type(sets).__name__}.")
    if sets.weights not in (None, weights_digest(model)):
        raise ValueError(f"`sets` were fitted to other weights than this {type(model).__name__} has: fit them again.")
    vars(model)[_OWN] = _of_weights(sets, model)


def _of_weights(sets: Sets, model: nn.Module) -> Sets:
    """Of numbers they do not say whose weights they are of: the model's present ones."""
    return sets if sets.weights is not None else replace(sets, weights=weights_digest(model))


def sets_of(model_or_posterior: Any) -> Sets | None:
    """Return the prediction sets or intervals that a model carries, or a posterior's model; None where there are none.

    Those of weights that have moved since are none, and a warning says so.
    """
    is_model = isinstance(model_or_posterior, nn.Module)
    model = model_or_posterior if is_model else getattr(model_or_posterior, "model", None)
    if not isinstance(model, nn.Module) or not isinstance(sets := vars(model).get(_OWN), Sets):
        return None
    if sets.weights in (None, weights_digest(model)):
        return sets
    logger.warning("The model's weights have moved since its prediction sets were fitted: they are not used.")
    return None


def write_guarantees(model: nn.Module, folder: Path) -> None:
    """Write what a model carries into its folder; a file that lies there of other weights is removed."""
    write_policy(model, folder)
    own = sets_of(model)
    for name, kind in _FILES.items():
        path = folder / name
        if isinstance(own, kind):
            own.save(folder)
        elif path.is_file() and not _is_of(path, kind, model):
            path.unlink()
            logger.warning("Removed %r, which was of other weights than those that are saved.", str(path))


def take_up_guarantees(model: nn.Module, find: Callable[[str], str | Path | None]) -> None:
    """Attach what lies beside a model's weights; what is of other weights, or of another dtype, only warns.

    Args:
        model: that was loaded.
        find: from a file's name to its path, None where there is none.
    """
    take_up_policy(model, find(POLICY_FILE))
    for name, kind in _FILES.items():
        path = find(name)
        if path is None:
            continue
        if _is_of(Path(path), kind, model):
            vars(model)[_OWN] = _of_weights(kind.load(path), model)
        else:
            logger.warning("%r is damaged, or of other weights than were loaded: fit it again.", str(path))


def _is_of(path: Path, kind: type[Sets], model: nn.Module) -> bool:
    try:
        return kind.load(path).weights in (None, weights_digest(model))
    except ValueError:
        return False
