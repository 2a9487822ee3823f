"""Tasks of texts and classes whose official files are not GLUE's TSV: a row knows its reader and its hub copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from .glue import GlueTask, Split


@dataclass(frozen=True, kw_only=True)
class HubCopy:
    """The copy of a task on the Hugging Face hub, which has a column of texts and one of class numbers.

    Attributes:
        name: of the data set.
        config: its configuration, if it has several.
        revision: its branch, if not the main one.
        text: the column of texts.
        label: the column of classes; their names count, as their order there is another.
        outside: the class whose rows belong to none of the task's classes; None without one.
        validation: the split that results are about where there is no other; it serves as ``validation``.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    text: str = "text"
    label: str = "label"
    outside: str | None = None
    validation: str = "validation"


@dataclass(frozen=True, kw_only=True)
class TextTask(GlueTask):
    """A row of `TEXT_TASKS` beside GLUE's.

    Attributes:
        read: from the folder of the official files to the splits ``train``, ``validation``, and where they exist
            ``test`` and ``shifted``.
        files: what messages call these files.
        hub: the copy on the hub.
        is_sorted: whether the rows are sorted by class, so that the first ones of a split are of few classes.
    """

    read: Callable[[str | PathLike[str]], dict[str, Split]]
    files: str
    hub: HubCopy
    is_sorted: bool = False


def from_hub(task: TextTask, splits: Mapping[str, Any]) -> dict[str, Split]:
    """Return the splits of the hub's copy, with the task's own order of labels.

    Args:
        task: a row of `TEXT_TASKS`.
        splits: datasets by split, whose label column has the names of its classes.

    Returns:
        As of the task's reader; rows of the class outside are left out, those of ``test`` are ``shifted``.

    Raises:
        ValueError: a split or a column is missing, or a class has an unknown name.
    """
    hub = task.hub
    names = {"train": "train", "validation": hub.validation}
    names |= {"test": "test"} if hub.validation != "test" else {}
    if missing := [name for name in names.values() if name not in splits]:
        raise ValueError(f"{hub.name} lacks the splits {', '.join(missing)}; it has {', '.join(splits)}.")
    found: dict[str, Split] = {}
    for split, name in names.items():
        texts, classes = _columns(task, splits[name])
        inside = [index for index, kind in enumerate(classes) if kind != hub.outside]
        labels = [task.parse_label(classes[index]) for index in inside]
        found[split] = {"text": [texts[index] for index in inside], "label": labels}
        if split == "test" and len(inside) < len(classes):
            found["shifted"] = {"text": [t for t, kind in zip(texts, classes, strict=True) if kind == hub.outside]}
    return found


def mixed(split: Split) -> Split:
    """Return the rows in an order that is drawn once and for all."""
    order = np.random.default_rng(0).permutation(len(split["text"]))
    return {name: [values[i] for i in order] for name, values in split.items()}


def _columns(task: TextTask, rows: Any) -> tuple[list[str], list[str]]:
    """Texts, and the names of their classes."""
    hub, features = task.hub, rows.features
    if missing := [name for name in (hub.text, hub.label) if name not in features]:
        raise ValueError(f"{hub.name} lacks the columns {', '.join(missing)}; it has {', '.join(features)}.")
    return [str(text).strip() for text in rows[hub.text]], [features[hub.label].names[i] for i in rows[hub.label]]
