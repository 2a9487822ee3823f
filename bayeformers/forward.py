"""What a model's forward takes, as callers give it (by name, one tensor, several, one mapping or list), and gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "IGNORED", "Inputs", "attended_positions", "batch_size", "call", "check_filled", "check_inputs", "holds_tensor",
    "labels_of", "logits_of", "mapped", "output_field", "rows", "tensors_in", "vocabulary_size", "wide",
    "without_cache",
]  # fmt: skip

Inputs = Mapping[str, Any] | Tensor | Sequence[Any]
"""A mapping of names to arguments, one tensor, or a tuple or list of several arguments. A forward of one argument that
is no tensor (a mapping, a list) gets it whole."""

IGNORED = -100
"""The label that counts for nothing."""

_POSITIONS = {"logits": 0, "start_logits": 0, "end_logits": 1}  # in a tuple

# the ends of the names that transformers gives its tensors
_TENSOR_NAMES = ("_ids", "_mask", "_embeds", "pixel_values", "input_values")


def call(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    """Return ``model`` of its inputs; ``options`` are added to arguments that go by name.

    >>> class Sum(nn.Module):
    ...     def forward(self, a, b): return a + b
    >>> a, b = torch.ones(1), torch.ones(1)
    >>> call(Sum(), (a, b)), call(Sum(), {"a": a, "b": b})
    (tensor([2.]), tensor([2.]))
    """
    if isinstance(inputs, Tensor) or _takes_whole(model, inputs):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**(options | dict(inputs)))
    return model(*inputs)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return ``use_cache=False`` for a model that has the argument, or, as PEFT's, hands it on to one that has it."""
    parameters = dict(inspect.signature(model.forward).parameters)
    base: Any = getattr(model, "get_base_model", None)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and callable(base):
        parameters |= inspect.signature(base().forward).parameters
    return {"use_cache": False} if "use_cache" in parameters else {}


def check_inputs(inputs: Any) -> Inputs:
    """Return what can be a batch.

    Raises:
        TypeError: anything else than a mapping, a tensor, or a tuple or list that holds a tensor; in a mapping an array
            or numbers in place of a tensor, or token ids that are no whole numbers.
    """
    is_batch = isinstance(inputs, (Mapping, Tensor)) or (isinstance(inputs, (list, tuple)) and holds_tensor(inputs))
    if not is_batch:
        raise TypeError(
            "`inputs` must be a mapping of names to tensors, one tensor, or a tuple or list of several, got "
            f"{type(inputs).__name__}."
        )
    if isinstance(inputs, Mapping):
        is_untensored = all(map(_is_plain, inputs.values()))
        for name, value in inputs.items():
            _check_entry(str(name), value, or_numbers=is_untensored)
    found: Inputs = inputs
    return found


def check_filled(inputs: Inputs) -> None:
    """Raise ValueError for a batch of no example: all of its tensors have length 0."""
    entries = {f"inputs[{name!r}]": value for name, value in inputs.items()} if isinstance(inputs, Mapping) else {}
    shapes = [
        (name, tensor.shape)
        for name, value in (entries or {"inputs": inputs}).items()
        for tensor in tensors_in(value)
        if tensor.ndim
    ]
    if shapes and not any(shape[0] for _, shape in shapes):
        name, shape = shapes[0]
        raise ValueError(f"`{name}` has the shape {tuple(shape)}: the batch is empty, there is nothing to predict.")


def _check_entry(name: str, value: Any, *, or_numbers: bool) -> None:
    """Of a mapping; ``or_numbers``: lists of numbers are meant as tensors whatever they are called.

    Elsewhere they may be sizes, which are numbers for every model.

    Raises:
        TypeError: it should be a tensor.
    """
    if "label" in name:
        return
    is_numbers = _holds_numbers(value) and (or_numbers or name.endswith(_TENSOR_NAMES))
    if isinstance(value, np.ndarray) or is_numbers:
        raise TypeError(
            f"`inputs[{name!r}]` must be a tensor, got {type(value).__name__}: take `torch.as_tensor` of it, or give "
            'the tokenizer or processor `return_tensors="pt"`.'
        )
    if name.endswith("input_ids") and isinstance(value, Tensor) and value.is_floating_point():
        raise TypeError(f"`inputs[{name!r}]` must hold whole numbers, the ids of tokens, got {value.dtype}.")


def _is_plain(value: Any) -> bool:
    """No tensor, and nothing that a model could make one of by itself, such as an image."""
    return isinstance(value, (bool, int, float, str, np.ndarray)) or value is None or _holds_numbers(value)


def _holds_numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists."""
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
        if isinstance(value, (bool, str)):
            return False
        if isinstance(value, (int, float, np.number)):
            return True
    return False


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """All tensors, those inside mappings and sequences included, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_in(value)
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from tensors_in(value)


def holds_tensor(inputs: Any) -> bool:
    """Whether a tensor is somewhere in it."""
    return next(tensors_in(inputs), None) is not None


def mapped(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed; of a batch's mapping class a dict."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: mapped(value, change) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        parts = [mapped(value, change) for value in inputs]
        return parts if isinstance(inputs, list) else tuple(parts)
    return inputs


def batch_size(inputs: Inputs) -> int:
    """Length of the first tensor."""
    first = next(tensors_in(inputs), None)
    return len(first) if first is not None and first.ndim else 1


def rows(inputs: Inputs, part: slice | Tensor, size: int) -> Inputs:
    """Return some examples of a batch, as a batch of the same form.

    Args:
        inputs: the batch's tensors, nested as they may be; one of another length is shared by all examples.
        part: which examples: a slice, row numbers, or a mask (B,).
        size: B, the number of examples in the batch.
    """
    cut: Inputs = mapped(inputs, lambda tensor: tensor[part] if tensor.ndim and len(tensor) == size else tensor)
    return cut


def _takes_whole(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the forward has one argument and a mapping's names, or a list, are not its arguments."""
    if isinstance(inputs, tuple):
        return False
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in named if p.default is p.empty]
    if isinstance(inputs, Mapping):
        has_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return len(needed) == 1 and not has_any_name and not set(inputs) & {p.name for p in parameters}
    has_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return len(needed) == 1 and not has_more and (len(inputs) > len(named) or len(named) == 1)


# ---------------------------------------------------------------------------------------------------- outputs, labels


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in the wider dtype that it has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def output_field(output: Any, name: str) -> Any:
    """A field of a model's output, which is a ModelOutput, a mapping, a tuple, a tensor or an object; None without."""
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, Tensor):
        return output if name == "logits" else None
    if isinstance(output, tuple) and (position := _POSITIONS.get(name)) is not None:
        return output[position] if len(output) > position else None
    return getattr(output, name, None)


def logits_of(output: Any, name: str = "logits") -> Tensor:
    """Find the logits in a model's output.

    Returns:
        The logits, in float32 or wider.

    Raises:
        ValueError: it has none.
    """
    logits = output_field(output, name)
    if logits is None and name == "logits":
        logits = output_field(output, "logits_per_image")  # zero-shot classification of images by texts
    if not isinstance(logits, Tensor) or logits.dim() < 1:
        raise ValueError(f"`output` needs `{name}`, got {_described(output)}.")
    return wide(logits)


def labels_of(batch: Mapping[str, Any], name: str = "labels") -> Tensor:
    """Find a batch's labels.

    Returns:
        The tensor of that name.

    Raises:
        ValueError: they are missing or no tensor.
    """
    labels = batch.get(name)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"`{name}` must be a tensor in every training batch, got {type(labels).__name__}; "
            f"the batch has {sorted(batch)}."
        )
    return labels


def attended_positions(batch: Any, length: int, name: str = "attention_mask") -> Tensor | None:
    """Return the attention mask as bool, (B, T), if there is one for sequences of this length, else None.

    Args:
        batch: what a data loader gives; only a mapping has a mask.
        length: T, the number of positions in each sequence.
        name: the mask's key in the batch.
    """
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length else None


def _described(output: Any) -> str:
    return f"{type(output).__name__} with {list(output)}" if isinstance(output, Mapping) else type(output).__name__


def vocabulary_size(model: Any) -> int | None:
    """How many ids of tokens a model reads; None where it does not say, as one that reads no tokens."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a plain module; transformers' own, where no table is found
        return None
    size = getattr(table, "num_embeddings", None)
    return size if isinstance(size, int) else None
