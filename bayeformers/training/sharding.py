"""One pass over a dataset in which every example counts once, whatever the number of processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length

__all__ = ["example_lengths", "share_of", "sharded_batches"]

LENGTHS = ("length", "input_ids")
"""Columns that tell how long an example is: the number itself, or something as long."""


def sharded_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_batches: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterable[Any]:
    """This rank's batches: the same ones in the same order at every pass, and none of them in two ranks.

    Nothing is repeated to give all ranks as many. Of a stream every rank reads all and takes each ``world_size``-th
    batch; ``num_batches`` is then for the reader to count.

    Args:
        dataset: of known length, or an `IterableDataset`.
        collate: from examples to a batch.
        batch_size: of one rank.
        rank: of this process.
        world_size: number of processes.
        num_batches: as many batches of every rank, of examples chosen at random; all if None.
        seed: of this choice.
        options: of the `DataLoader`.

    >>> for rank in range(2):
    ...     print(list(sharded_batches([10, 11, 12], list, batch_size=2, rank=rank, world_size=2)))
    [[10, 12]]
    [[11]]
    """
    generator = torch.Generator().manual_seed(seed)  # else the DataLoader draws its seed from the global one
    options = {"batch_size": batch_size, "collate_fn": collate, "generator": generator, **options}
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        return EveryNth(DataLoader(dataset, **options), rank, world_size)
    limit = None if num_batches is None else num_batches * batch_size * world_size
    lengths = example_lengths(dataset)
    indices = share_of(len(dataset), lengths, rank=rank, world_size=world_size, limit=limit, seed=seed)
    examples = cast("Dataset[Any]", dataset)  # or a list, which has all that a loader needs
    return DataLoader(Subset(examples, indices), **options)


def share_of(
    num_examples: int,
    lengths: Sequence[int] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Indices of a rank's examples, the longest first: neighbours are as long, so that batches need next to no padding.

    ``limit``: so many examples of all ranks together, chosen at random; the longest or shortest would be no sample.

    >>> share_of(5, [3, 9, 3, 7, 1], rank=0, world_size=2), share_of(5, [3, 9, 3, 7, 1], rank=1, world_size=2)
    ([1, 0, 4], [3, 2])
    """
    chosen = list(range(num_examples))
    if limit is not None and limit < num_examples:
        generator = torch.Generator().manual_seed(seed)
        chosen = sorted(torch.randperm(num_examples, generator=generator)[:limit].tolist())
    if lengths is not None:
        chosen.sort(key=lambda index: -lengths[index])  # stable: examples of one length keep their order
    return chosen[rank::world_size]


def example_lengths(dataset: Any) -> list[int] | None:
    """Length of every example where it can be read without making the examples; else None.

    >>> example_lengths([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]), example_lengths([1.0, 2.0])
    ([3, 1], None)
    """
    if isinstance(dataset, list | tuple):
        rows = dataset
        name = next((n for n in LENGTHS if all(isinstance(row, Mapping) and n in row for row in rows)), None)
        return None if name is None else [_length(row[name]) for row in rows]
    name = next((n for n in LENGTHS if n in (getattr(dataset, "column_names", None) or ())), None)
    if name is None or not hasattr(dataset, "with_format"):
        return None
    return [_length(value) for value in dataset.with_format(None)[name]]


def _length(value: Any) -> int:
    return int(value) if isinstance(value, int) else len(value)


class EveryNth:
    """The batches number rank, rank + n, rank + 2 n, ... of a loader."""

    def __init__(self, loader: Iterable[Any], rank: int, n: int) -> None:
        self.loader, self.rank, self.n = loader, rank, n

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.loader) if number % self.n == self.rank)
