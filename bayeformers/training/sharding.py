"""One pass over a dataset in which every example counts once, whatever the number of processes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length

from .order import LENGTHS, LongestFirst, example_lengths

__all__ = ["example_lengths", "share_of", "sharded_batches"]


def sharded_batches(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_batches: int | None = None,
    equal: bool = False,
    seed: int = 0,
    length_names: Sequence[str] = LENGTHS,
    **options: Any,
) -> Iterable[Any]:
    """Return this rank's batches: the same ones in the same order at every pass, and none of them in two ranks.

    Nothing is repeated to give all ranks as many. Of a stream every rank reads all and takes each ``world_size``-th
    batch; ``num_batches`` is then for the reader to count.

    Args:
        dataset: of known length, or an `IterableDataset`.
        collate: from examples to a batch.
        batch_size: of one rank.
        rank: of this process.
        world_size: number of processes.
        num_batches: as many batches of every rank, of examples chosen at random; all if None.
        equal: whether all ranks need as many batches, as where each forward gathers a sharded model's weights; sizes
            then differ by 1 at most.
        seed: of this choice.
        length_names: columns that tell how long an example is; see `example_lengths`.
        options: of the `DataLoader`, which says in ``example_numbers`` where its examples stand in the dataset.

    Raises:
        ValueError: a stream, of which no process knows when it ends in another, where batches must be ``equal``.

    >>> for rank in range(2):
    ...     print(list(sharded_batches([10, 11, 12], list, batch_size=2, rank=rank, world_size=2)))
    [[10, 12]]
    [[11]]
    """
    generator = torch.Generator().manual_seed(seed)  # else the DataLoader draws its seed from the global one
    options = {"batch_size": batch_size, "collate_fn": collate, "generator": generator, **options}
    if isinstance(dataset, IterableDataset) or not has_length(dataset):
        if equal and world_size > 1:
            raise ValueError(
                "A sharded model needs a dataset of known length: a stream may end earlier in one process."
            )
        return EveryNth(DataLoader(dataset, **options), rank, world_size)
    limit = None if num_batches is None else num_batches * batch_size * world_size
    chosen = _chosen(len(dataset), limit, seed)
    lengths = example_lengths(dataset, chosen, names=length_names, collate=collate)
    indices = _longest_first(chosen, lengths)[rank::world_size]
    examples = cast("Dataset[Any]", dataset)  # or a list, which has all that a loader needs
    if equal:
        options["batch_sampler"] = _equal_batches(len(indices), len(chosen), options.pop("batch_size"), world_size)
    loader = DataLoader(Subset(examples, indices), **options)
    loader.example_numbers = indices
    return loader


def _equal_batches(own: int, number: int, batch_size: int, world_size: int) -> list[list[int]]:
    """Return the places of a rank's ``own`` of ``number`` examples, in as many batches as the largest share needs.

    Args:
        own: how many examples the rank has.
        number: how many all ranks have.
        batch_size: the most in a batch.
        world_size: number of processes.

    Raises:
        ValueError: the rank has fewer examples than batches are needed.

    >>> _equal_batches(3, 7, 2, 2)
    [[0], [1, 2]]
    """
    count = math.ceil(math.ceil(number / world_size) / batch_size)
    if own < count:
        raise ValueError(
            f"{number} examples in batches of {batch_size} cannot be shared by {world_size} processes of a sharded "
            "model, which all need as many batches: take a larger `batch_size`, or a multiple of the processes."
        )
    return [[*range(own * index // count, own * (index + 1) // count)] for index in range(count)]


def share_of(
    num_examples: int,
    lengths: Sequence[int] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Return indices of a rank's examples, the longest first: batches of neighbours need next to no padding.

    Args:
        num_examples: of the dataset.
        lengths: of all its examples, if they are known.
        rank: of this process.
        world_size: number of processes.
        limit: so many examples of all ranks, chosen at random; the longest or shortest would be no sample.
        seed: of this choice.

    >>> share_of(5, [3, 9, 3, 7, 1], rank=0, world_size=2), share_of(5, [3, 9, 3, 7, 1], rank=1, world_size=2)
    ([1, 0, 4], [3, 2])
    """
    chosen = _chosen(num_examples, limit, seed)
    return _longest_first(chosen, None if lengths is None else [lengths[i] for i in chosen])[rank::world_size]


def _chosen(num_examples: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= num_examples:
        return list(range(num_examples))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_examples, generator=generator)[:limit].tolist())


def _longest_first(indices: Sequence[int], lengths: Sequence[int] | None) -> list[int]:
    return list(indices) if lengths is None else [indices[place] for place in LongestFirst(lengths).order]


class EveryNth:
    """The batches number rank, rank + n, rank + 2 n, ... of a loader."""

    def __init__(self, loader: Iterable[Any], rank: int, n: int) -> None:
        self.loader, self.rank, self.n = loader, rank, n

    def __iter__(self) -> Iterator[Any]:
        return (batch for number, batch in enumerate(self.loader) if number % self.n == self.rank)
