"""Reading a dataset by length, whose neighbours need next to no padding, and putting its rows back in their order."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Sampler, Subset
from transformers import EvalPrediction
from transformers.trainer_utils import has_length

from ..sampling.random_state import preserved

__all__ = ["LENGTHS", "LengthCache", "LongestFirst", "RowOrder", "example_lengths"]

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
    """Return the length of every example, or of those at ``indices``; None where it is not known.

    Read from a column where there is one. The examples of another map-style dataset are made once for it, if the first
    ones are texts or hold token ids and nothing larger, and differ in length.

    Args:
        dataset: anything; a stream has no length.
        indices: of the examples; all by default.
        names: columns that tell how long an example is.
        collate: makes tokens of texts, whose characters are counted without it.

    >>> example_lengths([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]), example_lengths([1.0, 2.0])
    ([3, 1], None)
    """
    if not has_length(dataset) or len(dataset) == 0:
        return None
    chosen = range(len(dataset)) if indices is None else indices
    try:
        with preserved():  # an example may be made at random, and so may a batch
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


class LongestFirst(Sampler[int]):
    """Every example once, by falling length: neighbours are as long, so that batches need next to no padding."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda index: -lengths[index])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class _Recorded:
    """A batch sampler that notes what it gives."""

    def __init__(self, sampler: Any) -> None:
        self.sampler_, self.seen = sampler, list[Any]()

    def __len__(self) -> int:
        return len(self.sampler_)

    def __iter__(self) -> Iterator[Any]:
        self.seen.clear()
        for batch in self.sampler_:
            self.seen.extend(batch if isinstance(batch, list | tuple) else [batch])
            yield batch

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler_", "seen"):  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.sampler_, name)


class RowOrder:
    """Where the rows of one pass over a loader stand in its dataset.

    Accelerate gathers the processes' rows in the order of the sampler that it splits among them, so that order, seen
    by the main process, is that of all rows.
    """

    def __init__(self, num_processes: int = 1) -> None:
        self._num_processes = num_processes
        self._recorded: _Recorded | None = None
        self._order: NDArray[np.intp] | None = None

    @contextlib.contextmanager
    def recording(self, loader: DataLoader[Any]) -> Iterator[None]:
        """Around the pass."""
        base = getattr(loader, "base_dataloader", loader)  # accelerate wraps
        is_split = self._num_processes == 1 or base is not loader
        place = _sampler_of(base) if is_split and isinstance(base, DataLoader) else None
        if place is None:
            yield
            return
        holder, name = place
        own, in_order = getattr(holder, name), base.in_order
        self._recorded = own if isinstance(own, _Recorded) else _Recorded(own)
        if own is not self._recorded and base.persistent_workers:
            base._iterator = None  # it would go on with the sampler that it began with
        try:
            # past DataLoader's lock on its sampler; workers that overtake each other would mix the rows
            object.__setattr__(holder, name, self._recorded)
            base.in_order = True
            yield
        finally:
            if not base.persistent_workers:
                object.__setattr__(holder, name, own)
                base.in_order = in_order

    def sort(self, rows: Any, count: int | None = None) -> Any:
        """Return arrays of ``rows``, nested as they may be, in the dataset's order; others as they are.

        ``count``: of the first rows alone, where an array is longer for being padded to whole batches.
        """
        if rows is None or isinstance(rows, str | bytes):
            return rows
        if isinstance(rows, Mapping):
            return type(rows)({name: self.sort(value, count) for name, value in rows.items()})  # type: ignore[call-arg]
        if isinstance(rows, list | tuple):
            return type(rows)(self.sort(value, count) for value in rows)
        if not isinstance(rows, np.ndarray) or rows.ndim == 0:
            return rows
        places = self._places(len(rows) if count is None else min(count, len(rows)))
        return rows if places is None else np.concatenate([rows[places], rows[len(places) :]])

    def sort_prediction(self, found: EvalPrediction) -> EvalPrediction:
        """What `compute_metrics` is given; ``losses`` are those of batches, one for each row and some more."""
        count = self.num_rows
        return EvalPrediction(
            predictions=self.sort(found.predictions),
            label_ids=self.sort(found.label_ids),
            inputs=self.sort(found.inputs),
            losses=self.sort(found.losses, count),
        )

    @property
    def num_rows(self) -> int:
        """Of the pass."""
        return len(self._seen())

    def _places(self, count: int) -> NDArray[np.intp] | None:
        """Which row to take for each place; None where they stand right, or are no rows of the pass."""
        order = self._seen()
        if count > len(order):
            return None
        places = np.argsort(order[:count], kind="stable")
        return None if bool((places == np.arange(count)).all()) else places

    def _seen(self) -> NDArray[np.intp]:
        if self._order is None:
            seen = [] if self._recorded is None else self._recorded.seen
            if self._num_processes > 1:  # a loader that dispatches is read by the main process alone
                seen = broadcast_object_list([seen])[0]
            known = all(isinstance(index, int | np.integer) for index in seen)
            self._order = np.asarray(seen if known else [], dtype=np.intp)
        return self._order


def _sampler_of(loader: DataLoader[Any]) -> tuple[Any, str] | None:
    """The object that holds the innermost batch sampler, and its attribute; None for a stream."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    holder: Any = loader
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    while getattr(getattr(holder, name), "batch_sampler", None) is not None:
        holder, name = getattr(holder, name), "batch_sampler"
    return holder, name
