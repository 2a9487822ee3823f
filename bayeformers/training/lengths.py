"""How long a dataset's examples are: batches of neighbours in that order need next to no padding."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from transformers.trainer_utils import has_length

from .elbo import preserved_rng

__all__ = ["LengthCache", "example_lengths"]

LENGTHS = ("length", "input_ids")
"""Columns that tell how long an example is: the number itself, or something as long."""
_LOOKED_AT = 16  # examples that must differ in length before all are made for their lengths' sake
_CACHED = 8


def example_lengths(
    dataset: Any, indices: Sequence[int] | None = None, *, names: Sequence[str] = LENGTHS
) -> list[int] | None:
    """Length of every example, or of those at ``indices``; None where it is not known.

    Read from a column where there is one. The examples of another map-style dataset are made once for it, if the first
    ones are texts or hold token ids and nothing larger, and differ in length.

    >>> example_lengths([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]), example_lengths([1.0, 2.0])
    ([3, 1], None)
    """
    if not has_length(dataset) or len(dataset) == 0:
        return None
    chosen = range(len(dataset)) if indices is None else indices
    try:
        return _lengths(dataset, chosen, tuple(names))
    except (TypeError, ValueError):  # a column that only bears the name
        return None


def _lengths(dataset: Any, chosen: Sequence[int], names: tuple[str, ...]) -> list[int] | None:
    if isinstance(dataset, Subset):
        return _lengths(dataset.dataset, [dataset.indices[i] for i in chosen], names)
    if isinstance(dataset, ConcatDataset):
        return _concatenated(dataset, chosen, names)
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        return _of_columns(dataset, chosen, names)
    if isinstance(dataset, list | tuple):
        return _of_examples([dataset[i] for i in chosen], names)
    return _made(dataset, chosen, names) if hasattr(dataset, "__getitem__") else None


def _concatenated(dataset: ConcatDataset[Any], chosen: Sequence[int], names: tuple[str, ...]) -> list[int] | None:
    start, wanted = 0, set(chosen)
    found: dict[int, int] = {}
    for part in dataset.datasets:
        size = len(part)  # type: ignore[arg-type]
        parts = [i - start for i in range(start, start + size) if i in wanted]
        lengths = _lengths(part, parts, names) if parts else []
        if lengths is None:
            return None
        found |= {start + i: length for i, length in zip(parts, lengths, strict=True)}
        start += size
    return [found[i] for i in chosen]


def _of_columns(dataset: Any, chosen: Sequence[int], names: tuple[str, ...]) -> list[int] | None:
    """Of `datasets.Dataset`, without its transform; the characters of its texts stand for tokens not made yet."""
    plain = dataset.with_format(None)
    name = next((name for name in names if name in plain.column_names), None)
    columns = [name] if name is not None else _text_columns(plain)
    if not columns:
        return None
    plain = plain if chosen == range(len(plain)) else plain.select(list(chosen))
    values = [[_length(value) for value in plain[column]] for column in columns]
    return [sum(row) for row in zip(*values, strict=True)]


def _text_columns(dataset: Any) -> list[str]:
    return [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) == "string"]


def _made(dataset: Any, chosen: Sequence[int], names: tuple[str, ...]) -> list[int] | None:
    with preserved_rng():  # an example may be made at random
        first = [dataset[i] for i in chosen[:_LOOKED_AT]]
        found = _of_examples(first, names) if all(map(_is_light, first)) else None
        if found is None or len(chosen) > len(first) and len(set(found)) < 2:
            return None
        rest = [_of_examples([dataset[i]], names) for i in chosen[_LOOKED_AT:]]
    if any(length is None for length in rest):
        return None
    return found + [length[0] for length in rest if length is not None]


def _is_light(example: Any) -> bool:
    """No image or sound, which are dear to make."""
    values: Iterable[Any] = example.values() if isinstance(example, Mapping) else [example]
    return all(not isinstance(v, Tensor) or v.ndim < 2 for v in values)


def _of_examples(rows: Sequence[Any], names: tuple[str, ...]) -> list[int] | None:
    if all(isinstance(row, str) for row in rows):
        return [len(row) for row in rows]
    if not all(isinstance(row, Mapping) for row in rows):
        return None
    name = next((name for name in names if all(name in row for row in rows)), None)
    if name is not None:
        return [_length(row[name]) for row in rows]
    texts = [sum(len(value) for value in row.values() if isinstance(value, str)) for row in rows]
    return texts if all(texts) else None


def _length(value: Any) -> int:
    if isinstance(value, Tensor) and value.ndim == 0 or not isinstance(value, Sized):
        return int(value)
    return len(value)


class LengthCache:
    """Lengths of the datasets asked for last: an evaluation during training asks for the same ones again."""

    def __init__(self, of: Callable[[Any], list[int] | None] = example_lengths) -> None:
        self._of, self._known = of, dict[Any, tuple[Any, int, list[int] | None]]()

    def __call__(self, dataset: Any) -> list[int] | None:
        """As `example_lengths`; a list that was edited in place and has its old length is not measured again."""
        key = getattr(dataset, "_fingerprint", None) or id(dataset)  # a `datasets.Dataset` is copied at every use
        kept, size, found = self._known.get(key, (None, -1, None))
        if size == len(dataset) and (kept is dataset or isinstance(key, str)):
            return found
        found = self._of(dataset)
        if len(self._known) >= _CACHED:
            self._known.pop(next(iter(self._known)))
        self._known[key] = (None if isinstance(key, str) else dataset, len(dataset), found)
        return found
