"""What a tensor holds, in a few bytes: a hash of its values, which tells a changed file from the one written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

_HEX = 32
_THREADS = 4
_VERSION = 1


def digest(tensor: Tensor) -> str:
    """SHA-256 of shape, dtype and values, cut to 128 bits; the same on every device.

    >>> digest(torch.zeros(2)) == digest(torch.zeros(2).clone()), digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
    (True, False)
    """
    values = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tuple(values.shape)} {values.dtype}".encode())
    found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:_HEX]


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
    partial.write_text(json.dumps({"version": _VERSION, "sha256": dict(sorted(digests.items()))}, indent=1) + "\n")
    partial.replace(target)


def read_digests(path: str | os.PathLike[str]) -> dict[str, str] | None:
    """What `write_digests` wrote; None for a newer version, whose digests this one cannot compute.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(Path(path).read_text())
        return {str(k): str(v) for k, v in content["sha256"].items()} if content["version"] == _VERSION else None
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
