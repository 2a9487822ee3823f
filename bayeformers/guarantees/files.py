"""A JSON record beside a model's weights, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..storage import folder

__all__ = ["read_record", "write_record"]

VERSION = 1


def write_record(path: str | os.PathLike[str], name: str, record: Mapping[str, Any]) -> Path:
    """Write a record as a JSON file.

    Args:
        path: the file, which ends in ".json", or the folder that it is put into under ``name``.
        name: of the file in a folder.
        record: what JSON can hold; no NaN, no infinity.

    Returns:
        The file's path.

    Raises:
        TypeError: ``path`` is no path.
    """
    target = folder(path)
    target = target if target.suffix == ".json" else target / name
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"version": VERSION, **record}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(target)
    return target


def read_record(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Args:
        path: the file, or its folder.
        name: of the file in a folder.

    Returns:
        The record, without its version.

    Raises:
        ValueError: there is no such file, it is damaged, or of a newer version.
    """
    given = folder(path)
    target: Path = given / name if given.is_dir() else given
    if not target.is_file():
        raise ValueError(f"There is no {name} at {str(path)!r}.")
    try:
        record = dict(json.loads(target.read_text(encoding="utf-8")))
        version = record.pop("version")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(target)!r} is damaged: {error!r}.") from error
    if version != VERSION:
        raise ValueError(f"{str(target)!r} is of version {version!r}; this bayeformers reads version {VERSION}.")
    return record
