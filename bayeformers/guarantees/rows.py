"""The batches of a calibration set: inputs, labels, and a column that says each row's group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import default_data_collator

from ..forward import mapped
from ..likelihoods import unwrapped

__all__ = ["check_order", "predicted_rows"]

Row = tuple[Any, Any, list[Any]]

_LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def check_order(dataset: Any, **given: Any) -> None:
    """Check that rows for which numbers are given one by one come in their own order.

    Args:
        dataset: of the rows.
        **given: arguments that may have one entry per row.

    Raises:
        ValueError: the dataset shuffles its rows.
    """
    listed = [name for name, value in given.items() if hasattr(value, "__len__") and not isinstance(value, str)]
    if listed and isinstance(dataset, DataLoader) and isinstance(dataset.sampler, RandomSampler):
        raise ValueError(
            f"`{listed[0]}` has one entry per row, and `dataset` is a DataLoader that shuffles its rows, so that they "
            "would be of other rows: take shuffle=False."
        )


def predicted_rows(
    model: nn.Module,
    dataset: Any,
    batch_size: int,
    data_collator: Callable[[list[Any]], Any] | None,
    column: str | None,
) -> Iterator[Row]:
    """Give batches on the model's device with their labels, and the entries of a column.

    Args:
        model: whose forward says which columns of a dataset it takes; others, such as texts, are left out.
        dataset: with rows (``__getitem__`` and a length), or batches: a DataLoader or a list of them.
        batch_size: of rows.
        data_collator: makes a batch of rows; None: transformers' default, or torch's of rows that are no mappings.
        column: the name of each row's group, of a dataset with named columns; None: no groups.

    Yields:
        The batch, its labels (a tensor, or the batch that has them by name), and the column's entries.

    Raises:
        TypeError: the dataset is none.
        ValueError: it is empty, or has no such column.
    """
    if dataset is None:
        raise ValueError("`dataset` must hold labelled calibration rows where a model or posterior is given, got None.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if _holds_batches(dataset):
        if column is not None:
            raise ValueError(f"`groups`={column!r} needs a dataset of rows: of batches give one entry per row.")
        batches: Iterable[tuple[Any, list[Any]]] = ((batch, []) for batch in dataset)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        batches = _collated(model, dataset, batch_size, data_collator, column)
    else:
        raise TypeError(
            "`dataset` must be a dataset of rows, a DataLoader or a list of batches (of tensors), got "
            f"{type(dataset).__name__}."
        )
    is_empty = True
    for batch, values in batches:
        is_empty = False
        moved = mapped(batch, lambda tensor: tensor.to(device))
        yield (*_split(moved), values)
    if is_empty:
        raise ValueError("`dataset` is empty: there is nothing to calibrate on.")


def _holds_batches(dataset: Any) -> bool:
    if isinstance(dataset, DataLoader):
        return True
    if isinstance(dataset, Dataset) or hasattr(dataset, "column_names") or not isinstance(dataset, Sequence):
        return False
    first = dataset[0] if len(dataset) else None
    parts = first.values() if isinstance(first, Mapping) else first if isinstance(first, list | tuple) else ()
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return bool(tensors) and all(part.ndim > 0 for part in tensors) and (len(tensors) == len(list(parts)))


def _collated(
    model: nn.Module, dataset: Any, batch_size: int, data_collator: Any, column: str | None
) -> Iterator[tuple[Any, list[Any]]]:
    taken = _taken(model)
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        values: list[Any] = []
        if isinstance(rows[0], Mapping):
            if column is not None and column not in rows[0]:
                raise ValueError(f"`groups` must be a column of the dataset, one of {sorted(rows[0])}, got {column!r}.")
            values = [] if column is None else [_plain(row[column]) for row in rows]
            if taken is not None:
                rows = [{name: value for name, value in row.items() if name in taken} for row in rows]
            collate = default_data_collator if data_collator is None else data_collator
        elif column is not None:
            raise ValueError(f"`groups`={column!r} needs a dataset with named columns: give one entry per row.")
        else:
            collate = torch.utils.data.default_collate if data_collator is None else data_collator
        try:
            batch = collate(rows)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "`data_collator` must make one batch of the rows, as `DataCollatorWithPadding(tokenizer)` does of "
                f"texts that are not equally long: {error}"
            ) from error
        yield batch, values


def _taken(model: nn.Module) -> frozenset[str] | None:
    """Names of the forward's arguments and of labels; None where the forward takes any."""
    parameters = inspect.signature(unwrapped(model).forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters) and not named & {"input_ids", "pixel_values", "labels"}
    return None if is_open else frozenset({*named, *_LABELS})


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) or hasattr(value, "dtype") else value


def _split(batch: Any) -> tuple[Any, Any]:
    """The batch for `predict`, which leaves labels out itself, and the labels."""
    if isinstance(batch, Mapping):
        if batch.get("labels") is None and batch.get("label") is not None:
            batch = {**{name: value for name, value in batch.items() if name != "label"}, "labels": batch["label"]}
        return batch, batch
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise TypeError(
        f"`dataset` must give batches with labels: mappings or (inputs, labels), got {type(batch).__name__}."
    )
