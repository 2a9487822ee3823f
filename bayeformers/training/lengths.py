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
Collate = Callable[[list[Any]], Any]
_LOOKED_AT = 16  # examples that must differ in length before all are made for their lengths' sake
_CACHED = 8


def example_lengths(
    dataset: Any,
    indices: Sequence[int] | None = None,
    *,
    names: Sequence[str] = LENGTHS,
    collate: Collate | None = None,
) -> list[int] | None:
    """Length of every example, or of those at ``indices``; None where it is not known.

    Read from a column where there is one. The examples of another map-style dataset are made once for it, if the first
    ones are texts or hold token ids and nothing larger, and differ in length. ``collate`` makes tokens of texts, whose
    characters are counted without it.

    >>> example_lengths([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]), example_lengths([1.0, 2.0])
    ([3, 1], None)
    """
    if not has_length(dataset) or len(dataset) == 0:
        return None
    chosen = range(len(dataset)) if indices is None else indices
    try:
        with preserved_rng():  # an example may be made at random, and so may a batch
            return _lengths(dataset, chosen, tuple(names), collate)
    except (TypeError, ValueError):  # a column that only bears the name
        return None


def _lengths(dataset: Any, chosen: Sequence[int], names: tuple[str, ...], collate: Collate | None) -> list[int] | None:
    if isinstance(dataset, Subset):
        return _lengths(dataset.dataset, [dataset.indices[i] for i in chosen], names, collate)
    if isinstance(dataset, ConcatDataset):
        return _concatenated(dataset, chosen, names, collate)
    column = next((name for name in names if name in (getattr(dataset, "column_names", None) or ())), None)
    if column is not None and hasattr(dataset, "with_format"):
        return _of_column(dataset, chosen, column)
    if isinstance(dataset, list | tuple):
        return _of_examples([dataset[i] for i in chosen], names, collate)
    return _made(dataset, chosen, names, collate) if hasattr(dataset, "__getitem__") else None


def _concatenated(
    dataset: ConcatDataset[Any], chosen: Sequence[int], names: tuple[str, ...], collate: Collate | None
) -> list[int] | None:
    start, wanted = 0, set(chosen)
    found: dict[int, int] = {}
    for part in dataset.datasets:
        size = len(part)  # type: ignore[arg-type]
        parts = [i - start for i in range(start, start + size) if i in wanted]
        lengths = _lengths(part, parts, names, collate) if parts else []
        if lengths is None:
            return None
        found |= {start + i: length for i, length in zip(parts, lengths, strict=True)}
        start += size
    return [found[i] for i in chosen]


def _of_column(dataset: Any, chosen: Sequence[int], name: str) -> list[int]:
    """Of `datasets.Dataset`, without its transform."""
    plain = dataset.with_format(None)
    plain = plain if chosen == range(len(plain)) else plain.select(list(chosen))
    return [_length(value) for value in plain[name]]


def _made(dataset: Any, chosen: Sequence[int], names: tuple[str, ...], collate: Collate | None) -> list[int] | None:
    first = [dataset[i] for i in chosen[:_LOOKED_AT]]
    found = _of_examples(first, names, collate) if all(map(_is_light, first)) else None
    if found is None or len(chosen) > len(first) and len(set(found)) < 2:
        return None
    rest = [_of_examples([dataset[i]], names, collate) for i in chosen[_LOOKED_AT:]]
    if any(length is None for length in rest):
        return None
    return found + [length[0] for length in rest if length is not None]


def _is_light(example: Any) -> bool:
    """No image or sound, which are dear to make."""
    values: Iterable[Any] = example.values() if isinstance(example, Mapping) else [example]
    return all(not isinstance(v, Tensor) or v.ndim < 2 for v in values)


def _of_examples(rows: Sequence[Any], names: tuple[str, ...], collate: Collate | None) -> list[int] | None:
    if all(isinstance(row, Mapping) for row in rows):
        name = next((name for name in names if all(name in row for row in rows)), None)
        if name is not None:
            return [_length(row[name]) for row in rows]
    texts = [_characters(row) for row in rows]
    if not all(texts):
        return None
    tokens = None if collate is None else [_tokens(collate, row) for row in rows]
    return texts if tokens is None or None in tokens else tokens  # type: ignore[return-value]


def _characters(row: Any) -> int:
    values = row.values() if isinstance(row, Mapping) else [row]
    return sum(len(value) for value in values if isinstance(value, str))


def _tokens(collate: Collate, row: Any) -> int | None:
    """In a batch of one."""
    try:
        batch = collate([row])
    except Exception:  # a collator that needs several examples, or texts that only look like the input
        return None
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.shape[-1] if isinstance(ids, Tensor) and ids.ndim == 2 else None


def _length(value: Any) -> int:
    if isinstance(value, Tensor) and value.ndim == 0 or not isinstance(value, Sized):
        return int(value)
    return len(value)


class LengthCache:
    """Lengths of the datasets asked for last: an evaluation during training asks for the same ones again."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, int, list[int] | None]] = {}

    def __call__(self, dataset: Any, **options: Any) -> list[int] | None:
        """As `example_lengths`; a list that was edited in place and has its old length is not measured again."""
        key = getattr(dataset, "_fingerprint", None) or id(dataset)  # a `datasets.Dataset` is copied at every use
        kept, size, found = self._known.get(key, (None, -1, None))
        if size == len(dataset) and (kept is dataset or isinstance(key, str)):
            return found
        found = example_lengths(dataset, **options)
        if len(self._known) >= _CACHED:
            self._known.pop(next(iter(self._known)))
        self._known[key] = (None if isinstance(key, str) else dataset, len(dataset), found)
        return found
