"""A dataloader's batches as curvature needs them: inputs, labels, which positions count, no padding duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm

from ..forward import Inputs, batch_size, holds_tensor, mapped, rows
from ..likelihoods import IGNORED, Likelihood, get_likelihood, resolve_problem_type, unwrapped
from ..linearized import examples
from ..posteriors.heads import without_labels
from ..processes import gathered, process_index


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch.

    Attributes:
        inputs: what the model's forward takes, without labels.
        labels: aligned with the outputs, or None.
        attended: the attention mask (B, T) as bool, or None.
        has_padding: whether positions may be padding.
        numbers: where the examples stand in their dataset, if that is known.
    """

    inputs: Inputs
    labels: Tensor | None = None
    attended: Tensor | None = None
    has_padding: bool = False
    numbers: Sequence[int] | None = None

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def examples(self) -> Iterator[Batch]:
        """The same as batches of one."""
        for i, inputs in enumerate(examples(self.inputs, len(self))):
            labels, attended = (None if part is None else part[i : i + 1] for part in (self.labels, self.attended))
            yield Batch(inputs, labels, attended, self.has_padding)

    def labelled(self, likelihood: Likelihood) -> Batch:
        """Return the examples with a loss term: of a classification those with a label, somewhere, that is not -100.

        The others' curvature is 0, and what they read must not enter the average A of what the layers read. A
        regression has no ignored label, and without labels every example counts.
        """
        size = len(self)
        if self.labels is None or likelihood.has_noise or len(self.labels) != size:
            return self
        counts = (self.labels.reshape(size, -1) != IGNORED).any(1)
        if bool(counts.all()):
            return self
        attended = None if self.attended is None else self.attended[counts]
        numbers = None if self.numbers is None else [n for n, is_in in zip(self.numbers, counts, strict=True) if is_in]
        return Batch(rows(self.inputs, counts, size), self.labels[counts], attended, self.has_padding, numbers)


def likelihood_of(model: nn.Module, labels: Tensor | None = None) -> str:
    """Return the likelihood of the model's head; classification for a model that transformers does not know.

    ``labels``: of a batch; they tell single from multi label where the configuration does not.

    Raises:
        ValueError: a head whose labels are positions.
    """
    problem = resolve_problem_type(model, labels)
    family = get_likelihood(problem).family
    if family is None:
        raise ValueError(f"There is no Laplace posterior for a {problem!r} head yet; `to_bayesian` supports it.")
    return family


def prepare(model: nn.Module, batch: Any, device: torch.device, keep: int | None = None) -> Batch:
    """Return a batch of a DataLoader on a device; it is a mapping with labels inside, (inputs, labels), or inputs.

    Args:
        model: whose head says what its labels are.
        batch: as the loader gives it; another kind is refused with a TypeError.
        device: of the result.
        keep: number of leading examples that are no padding duplicates.
    """
    given, labels = _split(batch)
    size = batch_size(given)
    if keep is not None and keep < size:
        given, labels = rows(given, slice(keep), size), None if labels is None else labels[:keep]
    given = mapped(given, lambda tensor: tensor.to(device))
    labels = None if labels is None else labels.to(device)
    inputs = without_labels(
        model, {**given, "labels": labels} if isinstance(given, Mapping) and labels is not None else given
    )
    likelihood = get_likelihood(resolve_problem_type(model, labels, or_unknown=True))
    is_padded = isinstance(inputs, Mapping) and any("mask" in name for name in inputs)
    return Batch(
        inputs, None if labels is None else likelihood.aligned(labels), _attended(model, inputs), has_padding=is_padded
    )


def real_examples(loader: Iterable[Any], number: int, length: int) -> int | None:
    """Return how many examples of a batch are no duplicates; None: all.

    Two samplers repeat examples so that every process has as many: torch's DistributedSampler, at the end, and that of
    a loader that accelerate prepared, in its last round.

    Args:
        loader: the loader that the batch came from.
        number: the batch's place in this process's pass, from 0.
        length: the number of examples in the batch.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(loader, DataLoader) and isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        size, start = len(sampler.dataset), number * (loader.batch_size or 1)  # type: ignore[arg-type]
        return sum(sampler.rank + (start + i) * sampler.num_replicas < size for i in range(length))
    remainder = getattr(loader, "remainder", -1) if getattr(loader, "end_of_dataloader", False) else -1
    if remainder is not None and remainder > 0 and torch.distributed.is_initialized():
        first = torch.distributed.get_rank() * length
        return max(0, min(length, remainder - first))
    return None


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
        dataset = getattr(loader, "dataset", None)
        self.num_data = len(dataset) if num_data is None and isinstance(dataset, Sized) else num_data
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if num_batches is not None and self.num_data is None:
            raise ValueError("`num_batches` needs `num_data` (N): the dataloader's dataset has no length.")

    def first(self) -> Batch:
        """Return the first batch; the loader must give one in every process."""
        first = next((prepare(self.model, batch, self.device) for batch in self.loader), None)
        is_empty = any(gathered(first is None))  # in all processes or in none: the others would wait for ever
        if first is None or is_empty:
            raise ValueError("`dataloader` is empty: it must give at least one batch (in every process).")
        return first

    def batches(self, description: str, skip: int = 0) -> Iterator[Batch]:
        """Give the batches from number ``skip`` on, with a progress bar of this ``description``."""
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


def _split(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        labels = next((batch[name] for name in ("labels", "label") if batch.get(name) is not None), None)
        return {k: v for k, v in batch.items() if k not in ("labels", "label")}, labels
    is_sequence = isinstance(batch, list | tuple)
    if is_sequence and len(batch) > 1 and isinstance(batch[-1], Tensor | None) and holds_tensor(batch[0]):
        if len(batch) > 2:  # as a TensorDataset of several inputs gives them
            return tuple(batch[:-1]), batch[-1]
        return (_split(batch[0])[0] if isinstance(batch[0], Mapping) else batch[0]), batch[1]
    if is_sequence and len(batch) == 1 and isinstance(batch[0], Tensor | Mapping):
        return _split(batch[0])
    raise TypeError(
        "`dataloader` must give mappings, (inputs, labels) pairs (several inputs: the labels last) or tensors, got "
        f"{type(batch).__name__}."
    )


def _attended(model: nn.Module, inputs: Inputs) -> Tensor | None:
    """None also for an encoder-decoder: its two sequences may be equally long, and which is meant cannot be seen."""
    is_pair = getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False)
    if not isinstance(inputs, Mapping) or is_pair:
        return None
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
