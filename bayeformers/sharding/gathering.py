"""The whole weights of a sharded model, in one process, while they are saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapters import adapter_parts, has_adapters
from ..nn.base import bayesian_modules
from ..processes import gathered as from_all
from ..processes import process_index
from ..processes.dtensors import is_split, knowing, reshard, whole

Place = tuple[dict[str, Any], str, Tensor]
"""Where a module keeps a tensor: the dictionary, the name there, the tensor."""


def is_gathered(model: nn.Module) -> bool:
    """Whether :func:`gathered` holds the weights of ``model`` now, in this process or another."""
    return id(model) in _here


_here: dict[int, bool] = {}  # the ids of modules whose weights are gathered, and whether in this process


@contextlib.contextmanager
def gathered(model: nn.Module, *, adapters_only: bool = False, also: Iterable[Tensor] = ()) -> Iterator[bool]:
    """Inside, the first process has the weights whole, as plain Parameters in the host's memory: it can save them.

    All processes have to enter; the others get False and wait at the end, and they fail if the first one does. A model
    that is not sharded stays as it is, and every process gets True.

    Args:
        model: sharded by FSDP2.
        adapters_only: gather what PEFT and a conversion have added, and leave the base model in parts.
        also: tensors of the base model to gather too.

    Yields:
        Whether this process has the weights.

    Raises:
        RuntimeError: saving failed in the first process.
    """
    if not is_gathered(model):
        reshard(model)
    wanted = {id(tensor) for tensor in also} | _added(model) if adapters_only else None
    places = [] if is_gathered(model) else _places(model, wanted)
    if not places:
        yield _here.get(id(model), True)
        return
    is_first = process_index() == 0
    plain = _gather(places, is_first)
    error: BaseException | None = None
    modules = [id(module) for module in model.modules()]
    _here.update(dict.fromkeys(modules, is_first))
    try:
        if is_first:
            for holder, name, tensor in places:
                holder[name] = plain[id(tensor)]
            with knowing({key: value.detach() for key, value in plain.items()}):
                yield True
        else:
            yield False
    except BaseException as failure:
        error = failure
        raise
    finally:
        for key in modules:
            _here.pop(key, None)
        for holder, name, tensor in places:
            holder[name] = tensor
        told = from_all(None if error is None else repr(error))
        if error is None and any(told):
            raise RuntimeError(f"The model was not saved: {next(filter(None, told))} in another process.")


def _places(model: nn.Module, kept: set[int] | None) -> list[Place]:
    found: list[Place] = []
    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            found += [(holder, n, t) for n, t in holder.items() if is_split(t) and (kept is None or id(t) in kept)]
    return found


def _added(model: nn.Module) -> set[int]:
    """What an adapter's folder holds."""
    parts = adapter_parts(model) if has_adapters(model) else ()
    found = {id(parameter) for part in parts if not _is_original(part) for parameter in part.parameters()}
    for layer in bayesian_modules(model).values():
        found |= {id(p) for p in layer._parameters.values()} | {id(b) for b in layer._buffers.values()}
    return found | {id(p) for p in model.parameters() if p.requires_grad}


def _is_original(part: Any) -> bool:
    return bool(part.adapter == "original_module")


@torch.no_grad()
def _gather(places: list[Place], is_first: bool) -> dict[int, Tensor]:
    """By the id of the split tensor: one message each, in the same order everywhere."""
    found: dict[int, Tensor] = {}
    for _, _, tensor in places:
        if id(tensor) in found:
            continue
        value = whole(tensor)
        if is_first:
            copy = value.detach().to("cpu", copy=True)
            found[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        else:
            found[id(tensor)] = torch.empty(0)
    return found
