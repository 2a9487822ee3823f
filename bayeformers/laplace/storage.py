"""One safetensors file with tensors and a JSON header: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Tensors (shared storage is written once per name) and JSON-able ``meta``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {"kind": kind, "version": str(VERSION), "meta": json.dumps(meta, default=str)}
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, partial, header)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote.

    Raises:
        ValueError: the file is missing, damaged, of another kind or of a newer version.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no {kind} file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # cloned to aligned memory, where products give the same bits as before the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found, version, meta = header.get("kind"), int(header.get("version", "0")), json.loads(header.get("meta", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no {kind} file: {error}") from error
    if found != kind:
        raise ValueError(f"{str(path)!r} holds {found or 'no bayeformers data'!r}, not {kind!r}.")
    if version > VERSION:
        raise ValueError(f"{str(path)!r} has version {version}; this bayeformers reads up to {VERSION}.")
    return tensors, meta
