"""One safetensors file with tensors and a JSON header, and what a tensor holds in a few bytes: a hash of its values.

Files are written whole or not at all, and checked when read; the digests tell a changed file from the one written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VERSION = 2
"""Of files in which a tensor has several names; others are of version 1."""

_HEX = 32
_THREADS = 4
_DIGESTS = 1


def digest(tensor: Tensor) -> str:
    """Return SHA-256 of shape, dtype and values, cut to 128 bits; the same on every device.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2).clone()), digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
    (True, False)
    """
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_HEX]


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Digests of everything in a model's state, by its name without wrappers' (data-parallel, compiled)."""
    state = {bare_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: digest(value) for name, value in state.items()}


def bare_name(name: str) -> str:
    """The name of a tensor without those of wrappers around its model."""
    first, _, rest = name.partition(".")
    return bare_name(rest) if first in ("module", "_orig_mod") and rest else name


def file_digests(files: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Of every tensor in safetensors files, by its name there; one tensor per thread is in memory at a time."""
    jobs = [(str(file), name) for file in files for name in tensor_names(file)]
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter's lock
        return dict(pool.map(_of_file, jobs))


def tensor_names(file: str | os.PathLike[str]) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def write_digests(path: str | os.PathLike[str], digests: Mapping[str, str]) -> None:
    """As JSON, whole or not at all."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"version": _DIGESTS, "sha256": dict(sorted(digests.items()))}, indent=1) + "\n")
    partial.replace(target)


def read_digests(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """Return what `write_digests` wrote; None for a newer version, whose digests this one cannot compute.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(Path(path).read_text())
        return {str(k): str(v) for k, v in content["sha256"].items()} if content["version"] == _DIGESTS else None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); remove it to load without this check.") from error


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """In words, how the tensors found differ from those expected; None: they do not."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    told = (("lacks", missing), ("holds besides", extra), ("has other values in", changed))
    parts = [f"{verb} {names[:3]} ({len(names)})" for verb, names in told if names]
    return " and ".join(parts) or None


def _of_file(job: tuple[str, str]) -> tuple[str, str]:
    file, name = job
    with safe_open(file, framework="pt") as opened:
        return name, digest(opened.get_tensor(name))


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, kind: str) -> None:
    """Write tensors, one that has several names once, and what JSON can hold into a file, whole or not at all.

    Args:
        path: of the file, whose folder is made if it is not there.
        tensors: by name, of any shapes and devices.
        meta: what else a reader needs, JSON-able.
        kind: what the file is, which a reader asks for.
    """
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
    """Return a folder's path.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"`directory` must be the path of a folder, got {directory!r}.")
    return Path(directory)


def saved_file(directory: Any, name: str) -> Path:
    """Return the path of a file that was saved as ``name`` into a folder, which may be given itself.

    Raises:
        TypeError: ``directory`` is no path.
    """
    path = folder(directory)
    return path if path.is_file() else path / name


def read(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write` wrote, every tensor of it, by the digests in the header; files of earlier versions have none.

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
    """Check that a file has the tensors that it should, and no others; none with NaN or infinite values.

    Args:
        tensors: by name, as they were read.
        expected: the names that the file should have.
        what: the file in words, which begin the message.

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
