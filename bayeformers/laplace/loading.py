"""A dataloader's batches as a pass reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..processes import gathered, process_index
from .data import prepare, real_examples


class Loader:
    """The dataloader's batches on the model's device, without duplicates, with a progress bar."""

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], num_batches: int | None, num_data: int | None, progress: bool
    ) -> None:
        if isinstance(loader, Iterator):
            raise TypeError("`dataloader` is read more than once: give a DataLoader or a list, not an iterator.")
        if not isinstance(loader, Iterable):
            raise TypeError(f"`dataloader` must give batches, got {type(loader).__name__}.")
        self.model, self.loader, self.num_batches, self.progress = model, loader, num_batches, progress
        self.num_data = num_data if num_data is not None else _dataset_length(loader)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if num_batches is not None and self.num_data is None:
            raise ValueError("`num_batches` needs `num_data` (N): the dataloader's dataset has no length.")

    def first(self) -> Any:
        found = next((prepare(self.model, batch, self.device) for batch in self.loader), None)
        if any(gathered(found is None)):  # in all processes or in none: the others would wait for ever
            raise ValueError("`dataloader` is empty: it must give at least one batch (in every process).")
        return found

    def batches(self, description: str, skip: int = 0) -> Iterable[Any]:
        total = len(self.loader) if isinstance(self.loader, Sized) else None
        total = total if self.num_batches is None else min(self.num_batches, total or self.num_batches)
        is_shown = self.progress and process_index() == 0
        numbers, size = getattr(self.loader, "example_numbers", None), getattr(self.loader, "batch_size", None) or 1
        with tqdm(total=total, initial=skip, desc=description, disable=not is_shown) as bar:
            for number, batch in enumerate(self.loader):
                if self.num_batches is not None and number >= self.num_batches:
                    return
                if number < skip:
                    continue
                whole = prepare(self.model, batch, self.device)
                keep = real_examples(self.loader, number, len(whole))
                if keep is not None and keep < len(whole):
                    whole = prepare(self.model, batch, self.device, keep)
                if numbers is not None:  # the Trainer's own loader, which repeats no example
                    whole = replace(whole, numbers=numbers[number * size : number * size + len(whole)])
                if len(whole):
                    yield whole
                bar.update()


def _dataset_length(loader: Iterable[Any]) -> int | None:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None
