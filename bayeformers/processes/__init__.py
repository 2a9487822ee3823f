"""What the processes of one launch have to agree on; alone, every function gives its argument back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def num_processes() -> int:
    """Of the default process group; 1 without one."""
    return torch.distributed.get_world_size() if _has_group() else 1


def process_index() -> int:
    """From 0."""
    return torch.distributed.get_rank() if _has_group() else 0


def gathered(value: Any) -> list[Any]:
    """Every process's value, a small picklable one, in the order of the processes."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """The sum over all processes, on the tensor's own device, bit for bit the same in all."""
    if num_processes() == 1:
        return value
    needs_gpu = value.device.type == "cpu" and torch.distributed.get_backend() == "nccl"
    total = value.detach().to("cuda" if needs_gpu else value.device, copy=True, memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total.to(value.device)


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
