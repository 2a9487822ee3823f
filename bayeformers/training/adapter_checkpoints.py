"""The checkpoint of a Bayesian `PeftModel`: PEFT's own files, and beside them the Bayesian tensors that those lack.

PEFT saves what its adapters are made of: no scale of a base layer, no bare Parameter's scale for some adapters, and for
prompts what the encoder computes. Some names that it writes it cannot read. So each tensor is told by its identity.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.adapters import ADAPTER_FILES, ADDED, CONFIG, RHO, clean_state, lacking
from ..checkpoint.adapters import TENSORS as BESIDE
from ..conversion.persistence import peft_state, saved_by_peft
from ..nn.base import is_bayesian, variational_tensors
from ..processes.dtensors import write
from .checkpoints import RESUMED, misfit, read, restore, same, unconverted, weight_files

__all__ = ["adapter_files", "check_adapter", "is_complete", "is_peft", "restore_adapter", "take_up"]


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a `PeftModel`, which saves its adapters and no base."""
    return hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)


def adapter_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of PEFT's adapters; none if there are none."""
    return [file for name in ADAPTER_FILES for file in sorted(Path(folder).rglob(name))]


def take_up(
    model: nn.Module,
    folder: str,
    stock: Callable[[], object],
    what: str = RESUMED,
    *,
    is_sharded: bool = False,
) -> None:
    """Write a checkpoint into ``model``, and verify every tensor.

    Args:
        model: unwrapped.
        folder: the checkpoint.
        stock: the Trainer's own way of reading it, which knows PEFT's adapters and shards.
        what: what the folder is, for the error.
        is_sharded: whether no process has whole parameters.
    """
    if is_peft(model):
        check_adapter(model, folder, what)
    if weight_files(folder) and not is_sharded:
        restore(model, folder, what)
        return
    if not is_complete(model, folder):
        stock()
    if is_peft(model):
        restore_adapter(model, folder, what)


def is_complete(model: Any, folder: str | os.PathLike[str]) -> bool:
    """Whether `restore_adapter` needs no PEFT: of prompts all that trains is saved, and PEFT fails at their scales."""
    if _is_clean(folder):
        return is_bayesian(model)
    configs = getattr(model, "peft_config", {}).values()
    return (Path(folder) / BESIDE).is_file() and any(config.is_prompt_learning for config in configs)


def check_adapter(model: nn.Module, folder: str | os.PathLike[str], what: str = RESUMED) -> None:
    """Check that the files in ``folder`` hold exactly the scales that ``model`` has.

    Args:
        model: a `PeftModel`, unwrapped.
        folder: the checkpoint.
        what: what the folder is, for the error.

    Raises:
        ValueError: they do not.
    """
    what, beside = f"{what} {str(folder)!r}", _beside(folder)
    saved = {name for file in adapter_files(folder) for name in read(file)} | set(beside)
    scales, expected = {name for name in saved if name.endswith(RHO)}, _rho_names(model)
    missing = [min(names) for names in expected if not names & scales]
    unknown = sorted(scales - set().union(*expected))
    if unknown and not expected:
        raise ValueError(unconverted(what, unknown))
    own = model.state_dict(keep_vars=True)
    missing += [n for n in _lacking(model, folder) if n.endswith(ADDED) and not n.endswith(RHO) and n not in saved]
    unknown += [n for n, t in beside.items() if not n.endswith(RHO) and (n not in own or own[n].shape != t.shape)]
    if missing or unknown:
        raise ValueError(misfit(what, missing, unknown))


@torch.no_grad()
def restore_adapter(model: nn.Module, folder: str | os.PathLike[str], what: str = RESUMED) -> None:
    """After PEFT has read its files: write what it left out into ``model``, and verify every tensor.

    Args:
        model: whose adapters PEFT has filled.
        folder: the checkpoint.
        what: what the folder is, for the error.

    Raises:
        RuntimeError: the adapters, or what was saved beside them, are not those that ``model`` has then.
    """
    own, differing = model.state_dict(keep_vars=True), []
    ids = {id(tensor) for tensor in own.values()}
    pairs = [(name, own[name], value) for name, value in _beside(folder).items()]
    for adapter in getattr(model, "peft_config", ()):
        file = _file_of(folder, adapter)
        saved = {} if file is None else read(file)
        state = (clean_state(model, adapter) if _is_clean(folder) else peft_state(model, own, adapter)) if saved else {}
        for name, tensor in state.items():
            is_own = id(tensor) in ids  # else computed: a prompt, which what it is computed of restores
            if name not in saved or tensor.shape != saved[name].shape:
                differing.append(name)
            elif is_own or not is_bayesian(model):
                pairs.append((name, tensor, saved[name]))
    for _, tensor, value in pairs:
        if id(tensor) in ids:
            write(tensor, value)
    differing += [name for name, tensor, value in pairs if not same(tensor, value)]
    if differing:
        raise RuntimeError(
            f"{what} {str(folder)!r} was read by PEFT, but {len(differing)} tensors of the model are not the "
            f"checkpoint's, such as {differing[:3]}."
        )


def _file_of(folder: str | os.PathLike[str], adapter: str) -> Path | None:
    """PEFT gives every adapter a folder but the one that is called "default"."""
    files = adapter_files(folder)
    found = [f for f in files if f.parent == Path(folder) / adapter] or [f for f in files if f.parent == Path(folder)]
    return found[0] if found else None


def _beside(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    file = Path(folder) / BESIDE
    return read(file) if file.is_file() else {}


def _is_clean(folder: str | os.PathLike[str]) -> bool:
    """Whether PEFT's files there hold no scale; an earlier bayeformers left in them what PEFT saves by itself."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / BESIDE).is_file()


def _lacking(model: Any, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """By its first name, each tensor that a conversion added or that trains, and that PEFT does not save."""
    if _is_clean(folder):
        return lacking(model, list(model.peft_config))
    own = model.state_dict(keep_vars=True)
    seen = saved_by_peft(model, own)
    found = {}
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen and (name.endswith(ADDED) or tensor.requires_grad):
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _rho_names(model: nn.Module) -> list[set[str]]:
    """For every distinct rho, all names under which a checkpoint may keep it: ties, and those that PEFT changes."""
    adapters: Iterable[str] = getattr(model, "peft_config", None) or ()
    own = model.state_dict(keep_vars=True)
    names: dict[int, set[str]] = {id(tensor.rho): set() for tensor in variational_tensors(model)}
    for name, tensor in own.items():
        if id(tensor) in names:
            names[id(tensor)] |= {name, *(name.replace(f".{adapter}.", ".") for adapter in adapters)}
    for adapter in adapters if names else ():
        for name, tensor in peft_state(model, own, adapter).items():
            if id(tensor) in names:
                names[id(tensor)].add(name)
    return list(names.values())
