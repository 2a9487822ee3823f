"""IDX files, the format of MNIST: unsigned bytes behind their sizes, as they are or in gzip."""

import gzip
import math
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_idx", "read_idx_pair"]

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTES = b"\x00\x00\x08"


def read_idx(path: str | PathLike[str], axes: int) -> NDArray[np.uint8]:
    """Return the array of an IDX file: two zero bytes, type 8, the number of axes; their sizes, big-endian; the values.

    ``axes`` is what it must have: 3 of images (N, H, W), 1 of labels (N,). gzip is known by its content.

    Raises:
        ValueError: the file is no IDX file of unsigned bytes, has another number of axes, or is cut short or too long.
    """
    data = _bytes(Path(path))
    if data[:3] != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it starts with {data[:4].hex(' ')!r}.")
    header = 4 + 4 * axes
    if len(data) < header or data[3] != axes:
        raise ValueError(f"{path} must have {axes} axes, and sizes for them, got {data[3:4].hex() or 'no'} axes.")
    sizes = tuple(int(size) for size in np.frombuffer(data, ">u4", count=axes, offset=4))
    if len(data) - header != math.prod(sizes):
        promised = f"{' x '.join(map(str, sizes))} = {math.prod(sizes):,} values"
        raise ValueError(f"{path} is damaged: its header promises {promised}, it holds {len(data) - header:,}.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    data = path.read_bytes()
    if data[:2] != _GZIP:
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: gzip says {error}.") from None


def read_idx_pair(folder: str | PathLike[str], prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (N, H, W) and labels (N,), ``{prefix}-images-idx3-ubyte`` and ``{prefix}-labels-idx1-ubyte``.

    Raises:
        ValueError: the two files disagree on N, or N is 0.
    """
    paths = [_find_idx(folder, prefix, kind) for kind in ("images", "labels")]
    images, labels = (read_idx(path, axes) for path, axes in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels) or images.size == 0:
        raise ValueError(f"{paths[0]} has {len(images):,} images, {paths[1]} has {len(labels):,} labels.")
    return images, labels


def _find_idx(folder: str | PathLike[str], prefix: str, kind: str) -> Path:
    """The file by MNIST's official name, with or without ``.gz``; ``kind``: "images" or "labels"."""
    plain = Path(folder) / f"{prefix}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"`data_dir` {folder} lacks {plain.name} (or {plain.name}.gz).")
