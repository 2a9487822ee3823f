"""Rows without labels in any form that a model's users have them, batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import default_data_collator

from ..forward import Inputs, mapped, rows
from ..likelihoods import unwrapped

__all__ = ["Collator", "Pool"]

Collator = Callable[[list[Any]], Any]
"""From a list of rows to a batch."""

_LABELS = ("label", "labels", "label_ids")


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows, and how batches are made of them.

    Attributes:
        rows: as the caller gave them.
        length: how many.
        collator: of rows that are looked up one by one; None of tensors, which are cut.
        device: of the batches.
    """

    rows: Any
    length: int
    collator: Collator | None
    device: torch.device

    @classmethod
    def of(cls, model: nn.Module, given: Any, name: str, data_collator: Collator | None) -> Pool:
        """Look at the rows, and at the first of them.

        Args:
            model: whose forward takes them.
            given: a `datasets.Dataset` or another sequence of mappings or tensors, a mapping of tensors with one
                length, or one tensor.
            name: the caller's argument, for messages.
            data_collator: as the caller gave it.

        Returns:
            The rows, not yet read but for the first.

        Raises:
            TypeError: it is nothing of this.
            ValueError: it is empty, or its tensors have several lengths.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if isinstance(given, Tensor) or (isinstance(given, Mapping) and _all_tensors(given)):
            tensors = [given] if isinstance(given, Tensor) else list(given.values())
            lengths = {len(tensor) if tensor.ndim else 1 for tensor in tensors}
            if len(lengths) > 1:
                raise ValueError(f"`{name}` must hold tensors with one number of rows, got {sorted(lengths)}.")
            length, collator = lengths.pop(), None
        elif (
            isinstance(given, Sized) and hasattr(given, "__getitem__") and not isinstance(given, Mapping | str | bytes)
        ):
            length, collator = len(given), data_collator or default_data_collator
        else:
            raise TypeError(
                f"`{name}` must be a `datasets.Dataset`, a list of rows (mappings or tensors), a mapping of tensors or "
                f"a tensor, got {_described(given)}."
            )
        if not length:
            raise ValueError(f"`{name}` is empty: it must have at least one row.")
        if collator is not None and not isinstance(given[0], Mapping | Tensor):
            raise TypeError(f"`{name}` must have rows that are mappings or tensors, got {type(given[0]).__name__}.")
        return cls(given, length, None if collator is None else _collating(model, collator, name), device)

    def __len__(self) -> int:
        return self.length

    def subset(self, numbers: Sequence[int]) -> Pool:
        """Some of the rows, in this order."""
        if self.collator is None:
            part = torch.as_tensor(numbers, dtype=torch.long)
            taken: Any = rows(self.rows, part, self.length)
        else:
            taken = Subset(self.rows, [int(number) for number in numbers])
        return Pool(taken, len(numbers), self.collator, self.device)

    def batches(self, batch_size: int, description: str, progress: bool) -> Iterator[Inputs]:
        """Give the rows in order, on the model's device and without labels, with a progress bar."""
        for start in tqdm(range(0, self.length, batch_size), desc=description, disable=not progress):
            stop = min(start + batch_size, self.length)
            if self.collator is None:
                batch = rows(self.rows, slice(start, stop), self.length)
            else:
                batch = self.collator([self.rows[number] for number in range(start, stop)])
            if isinstance(batch, Mapping):
                batch = {key: value for key, value in batch.items() if key not in _LABELS}
            yield mapped(batch, lambda tensor: tensor.to(self.device))


def _collating(model: nn.Module, collator: Collator, name: str) -> Collator:
    """Rows less their labels and, where some columns are arguments of the forward, less all that are none."""
    arguments = _arguments(model)

    def collate(part: list[Any]) -> Any:
        if not isinstance(part[0], Mapping):
            return torch.stack(part)
        known = arguments & set(part[0]) - set(_LABELS)
        kept = [
            {key: value for key, value in row.items() if (key in known if known else key not in _LABELS)}
            for row in part
        ]
        try:
            return collator(kept)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` has rows that {_name_of(collator)} makes no batch of ({error}). Rows of several lengths "
                "need `data_collator`, such as `transformers.DataCollatorWithPadding(tokenizer)`."
            ) from error

    return collate


def _arguments(model: nn.Module) -> set[str]:
    """What the forward takes by name; of an adapter's model also what its base takes."""
    found = set(inspect.signature(model.forward).parameters)
    return found | set(inspect.signature(unwrapped(model).forward).parameters)


def _all_tensors(given: Mapping[str, Any]) -> bool:
    return bool(given) and all(isinstance(value, Tensor) for value in given.values())


def _name_of(collator: Collator) -> str:
    return getattr(collator, "__name__", type(collator).__name__)


def _described(given: Any) -> str:
    if isinstance(given, Mapping):
        kinds = sorted({type(value).__name__ for value in given.values()})
        return f"a {type(given).__name__} of {', '.join(kinds) or 'nothing'}"
    return type(given).__name__
