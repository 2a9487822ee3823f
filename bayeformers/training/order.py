"""Evaluation in whatever order is cheapest, with rows that come back in the dataset's."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import EvalPrediction

__all__ = ["LongestFirst", "RowOrder"]


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
        """Arrays of ``rows``, nested as they may be, in the dataset's order; others as they are.

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
