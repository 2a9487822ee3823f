"""Tensors that are read a few megabytes at a time: an ensemble's members, in memory or in safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 2**18
"""Elements that are in memory at a time."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Tensors(Protocol):
    """Tensors by name, each readable in pieces."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor."""

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Tensor]:
        """The elements of a tensor in order, ``size`` at a time but for the last: flat, on the CPU or where it lies."""


class InMemory:
    """A mapping of tensors.

    Args:
        tensors: by name; they are not copied.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Tensor]:
        """The elements of a tensor, flat."""
        return iter(torch.split(self.tensors[name].reshape(-1), size))


class InFiles:
    """Safetensors files, which stay open: what is written in their place later does not change what is read.

    Read by plain system calls. A memory map's pages would count as the process's memory for as long as it lives.

    Args:
        paths: one file, or the shards of one model.

    Raises:
        ValueError: a file is missing, damaged, or has a tensor of a kind that no network is made of.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._places: dict[str, tuple[Any, int, torch.dtype]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            self._add(Path(path))

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"There is no file {str(path)!r}.")
        opened = path.open("rb", buffering=0)
        try:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= path.stat().st_size - 8:
                raise ValueError("it is too short")
            header = json.loads(opened.read(length))
            self.metadata |= header.pop("__metadata__", {})
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                self._places[name] = opened, 8 + length + begin, _DTYPES[entry["dtype"]]
                self.shapes[name] = tuple(entry["shape"])
                if 8 + length + end > path.stat().st_size:
                    raise ValueError("it is too short")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            opened.close()
            raise ValueError(f"{str(path)!r} is damaged or no safetensors file of a network: {error!r}.") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> InFiles:
        """Itself: it is only read, and from given places, so that copies of a model may share it."""
        return self

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Tensor]:
        """The elements of a tensor, flat, on the CPU."""
        file, begin, dtype = self._places[name]
        number = torch.Size(self.shapes[name]).numel()
        for start in range(0, number, size):
            chunk = torch.empty(min(size, number - start), dtype=dtype)
            view, offset = chunk.view(torch.uint8).numpy().data, begin + start * dtype.itemsize
            while len(view):
                got = os.preadv(file.fileno(), [view], offset)
                if got == 0:
                    raise ValueError(f"{file.name!r} ends within {name!r}.")
                view, offset = view[got:], offset + got
            yield chunk


class Renamed:
    """Other names for some tensors, and no others.

    Args:
        tensors: under their own names.
        names: new name -> own name.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, dict(names)
        self.shapes = {new: tensors.shapes[own] for new, own in self._names.items()}

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[Tensor]:
        """The elements of a tensor, flat."""
        return self._tensors.chunks(self._names[name], size)


def whole(tensors: Tensors, names: Collection[str]) -> dict[str, Tensor]:
    """The named tensors; those that are in memory as they are, those of files read into it."""
    if isinstance(tensors, InMemory):
        return {name: tensors.tensors[name] for name in names}
    return {
        name: torch.cat([chunk.cpu() for chunk in tensors.chunks(name)] or [torch.empty(0)]).reshape(
            tensors.shapes[name]
        )
        for name in names
    }


def same_bits(tensor: Tensor, chunks: Iterable[Tensor]) -> bool:
    """Whether a tensor has these elements, cast to its dtype, bit by bit: 0 and -0 differ, a NaN is itself."""
    flat, start = tensor.detach().reshape(-1), 0
    for chunk in chunks:
        part = flat[start : start + chunk.numel()]
        if not torch.equal(part.view(torch.uint8), chunk.to(flat.device, flat.dtype).view(torch.uint8)):
            return False
        start += chunk.numel()
    return True


def write(tensor: Tensor, chunks: Iterable[Tensor]) -> None:
    """Copy elements into a tensor in place, under ``torch.no_grad()``; no second tensor of its size is made."""
    if not tensor.is_contiguous():
        tensor.copy_(torch.cat([chunk.to(tensor) for chunk in chunks]).reshape(tensor.shape))
        return
    flat, start = tensor.view(-1), 0
    for chunk in chunks:
        flat[start : start + chunk.numel()].copy_(chunk)
        start += chunk.numel()
