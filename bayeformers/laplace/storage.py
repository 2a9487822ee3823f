"""One safetensors file with tensors and a JSON header: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..digests import difference, digest

VERSION = 2
"""Of files in which a tensor has several names; others are of version 1."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Tensors, one that has several names once, and JSON-able ``meta``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    first: dict[int, str] = {}
    aliases = {name: first.setdefault(id(value), name) for name, value in tensors.items()}
    aliases = {name: source for name, source in aliases.items() if name != source}
    header = {"kind": kind, "version": str(VERSION if aliases else 1), "meta": json.dumps(meta, default=str)}
    if aliases:
        header["aliases"] = json.dumps(aliases)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    written = {
        name: value.detach().cpu().contiguous().clone() for name, value in tensors.items() if name not in aliases
    }
    header["digests"] = json.dumps({name: digest(value) for name, value in written.items()})
    try:
        save_file(written, partial, header)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def folder(directory: Any) -> Path:
    """A folder's path.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"`directory` must be the path of a folder, got {directory!r}.")
    return Path(directory)


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` wrote, every tensor of it, by the digests in the header; files of earlier versions have none.

    Raises:
        ValueError: the file is missing, damaged, changed, of another kind or of a newer version.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no {kind} file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            # cloned to aligned memory, where products give the same bits as before the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        found, version, meta = header.get("kind"), int(header.get("version", "0")), json.loads(header.get("meta", "{}"))
        digests, aliases = json.loads(header.get("digests", "null")), json.loads(header.get("aliases", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no {kind} file: {error}") from error
    if found != kind:
        raise ValueError(f"{str(path)!r} holds {found or 'no bayeformers data'!r}, not {kind!r}.")
    if version > VERSION:
        raise ValueError(f"{str(path)!r} has version {version}; this bayeformers reads up to {VERSION}.")
    if digests is not None:
        told = difference({name: digest(value) for name, value in tensors.items()}, digests)
        if told is not None:
            raise ValueError(f"{str(path)!r} is damaged: of the tensors that were written it {told}.")
    return tensors | {name: tensors[source] for name, source in aliases.items() if source in tensors}, meta


def check_whole(tensors: Mapping[str, Tensor], expected: Iterable[str], what: str) -> None:
    """The tensors ``expected`` of a file, and no others; none with NaN or infinite values.

    Raises:
        ValueError: otherwise.
    """
    names = set(expected)
    for verb, wrong in (("lacks", names - tensors.keys()), ("has surplus tensors, such as", tensors.keys() - names)):
        if wrong:
            raise ValueError(f"{what} is damaged: it {verb} {sorted(wrong)[:3]} ({len(wrong)}).")
    for name in sorted(names):
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{what} is damaged: {name!r} has NaN or infinite values.")
