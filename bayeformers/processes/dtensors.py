"""Tensors that several processes hold in parts (torch's `DTensor`): the own part, the whole, and sums over all parts.

FSDP2 keeps Parameters in parts but for the forward and backward of their module, in which they are whole and plain.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def is_split(tensor: object) -> bool:
    """Whether several processes hold it in parts."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made such a tensor without it
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it, with its gradient; a plain tensor is its own part."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes, which all have to ask for it; without gradient where it is split."""
    if not is_split(tensor):
        return tensor
    known = known_whole(tensor)
    return tensor.detach().full_tensor() if known is None else known  # type: ignore[attr-defined]


_known: dict[int, Tensor] = {}


def known_whole(tensor: Tensor) -> Tensor | None:
    """All of a split tensor where this process has it at hand, see :func:`knowing`."""
    return _known.get(id(tensor))


@contextlib.contextmanager
def knowing(values: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, :func:`whole` sends nothing for the split tensors with these ids, whose values are known."""
    _known.update(values)
    try:
        yield
    finally:
        for key in values:
            _known.pop(key, None)


def split_like(value: Tensor, tensor: Any) -> Tensor:
    """Return ``value``, which every process has whole, split as ``tensor`` is; nothing is sent.

    Shape: that of ``tensor``, whole.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not is_split(tensor) or isinstance(value, DTensor):
        return value
    split: Tensor = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return split


def part_of(value: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of ``value``, which is whole or split as ``tensor`` is."""
    return own_part(split_like(value, tensor))


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole or split in the same way, into ``tensor`` in place, in its dtype."""
    own_part(tensor.detach()).copy_(part_of(value, tensor))


def first_row(tensor: Any) -> int:
    """Return the row of the whole tensor with which this process's part begins; its rows are neighbours.

    Raises:
        NotImplementedError: they are not, as where tensor parallelism and FSDP both split the rows.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    by_row = [placement for placement in tensor.placements if placement.is_shard(0)]
    if len(by_row) > 1 or any(type(placement) is not Shard for placement in by_row):
        raise NotImplementedError(f"The rows of a part of {tuple(tensor.shape)}, {tensor.placements}, are apart.")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offsets[0])


def groups_of(tensor: Any) -> tuple[Any, ...]:
    """The process groups over which a split tensor's parts add up to the whole, each element counted once."""
    return tuple(
        tensor.device_mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if placement.is_shard() and tensor.device_mesh.size(axis) > 1
    )


def summed_over(value: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum of all processes' ``value``; a process's gradient is that of the whole sum in what it holds itself."""
    total: Tensor = _Summed.apply(value, tuple(groups)) if groups else value  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """Every process adds the whole sum to its loss, which counts once: nothing is sent in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, groups: tuple[Any, ...]) -> Tensor:
        total = value.detach().clone()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP keeps this module's Parameters, which it frees and fills in place behind autograd's back."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def reshard(model: nn.Module) -> None:
    """Take the whole Parameters away that FSDP2 left after a forward, so that what is read or written is the parts."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not torch.distributed.is_initialized():
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()
