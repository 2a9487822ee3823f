"""The members of an ensemble as tensors under the model's own names, each checked to be a member of that model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .streamed import InFiles, InMemory, Renamed, Tensors, same_bits
from .variational import is_bayesian

_INDEX, _SINGLE, _ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_MOVED = r"(^|\.)position_ids$|rotary_emb\.inv_freq$"  # buffers that older versions of transformers saved

Given = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Tensors
"""A folder or a safetensors file, a state dict, a model, or tensors that are read in pieces."""


class Names:
    """The tensors of a model's state, each under its first name, and the other names by which a member may have it.

    Args:
        model: unwrapped. Its tied tensors have several names; a PEFT model's adapters have shorter ones in files.

    Raises:
        ValueError: the model is converted, has state that is no plain tensor, or tensors that are not in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_bayesian(model):
            raise ValueError(
                "`model` is converted: its layers are a posterior already, of which a mixture may be made."
            )
        self.model = model
        state = model.state_dict(keep_vars=True)
        strange = [name for name, value in state.items() if not _is_plain(value)]
        if strange:
            raise ValueError(f"`model` must have plain tensors in memory only, got others in {strange[:3]}.")
        first: dict[int, str] = {}
        self.spellings: dict[str, list[str]] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            own = first.setdefault(id(tensor), name)
            self.tensors.setdefault(own, tensor)
            self.spellings.setdefault(own, []).extend(dict.fromkeys((name, self._in_files(name))))

    def _in_files(self, name: str) -> str:
        """As PEFT writes the name of an active adapter's tensor."""
        adapter = getattr(self.model, "active_adapter", None)
        if not hasattr(self.model, "peft_config") or not isinstance(adapter, str):
            return name
        return re.sub(rf"\.(modules_to_save\.)?{re.escape(adapter)}(?=\.|$)", "", name)

    def member(self, given: Given, which: str) -> Tensors:
        """A member's tensors under this model's names.

        Args:
            given: the member.
            which: it in words, for errors.

        Returns:
            The tensors, readable in pieces.

        Raises:
            TypeError: it is nothing that can be a member.
            ValueError: it is of another architecture, has other shapes or labels, or values that are not finite.
        """
        tensors, is_whole = self._opened(given, which)
        found, known = dict[str, str](), set[str]()
        for own, names in self.spellings.items():
            there = [name for name in dict.fromkeys(names) if name in tensors.shapes]
            known.update(there)
            if there:
                found[own] = there[0]
                self._check_tied(tensors, there, which)
        ignored = [_MOVED, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        unknown = [n for n in tensors.shapes if n not in known and not any(re.search(p, n) for p in ignored)]
        missing = [own for own in self.tensors if own not in found] if is_whole else []
        if unknown or missing or not found:
            raise ValueError(
                f"{which} is no {type(self.model).__name__} as `model` is: it lacks {missing[:3]} ({len(missing)}) and "
                f"has {unknown[:3]} ({len(unknown)}) besides."
            )
        for own, name in found.items():
            self._check(tensors, own, name, which)
        return Renamed(tensors, found)

    def _check(self, tensors: Tensors, own: str, name: str, which: str) -> None:
        shape, expected = tuple(tensors.shapes[name]), tuple(self.tensors[own].shape)
        if shape != expected:
            raise ValueError(
                f"{which} has {own!r} of shape {shape}, `model` {expected}: it is of another architecture."
            )
        if not all(bool(torch.isfinite(chunk).all()) for chunk in tensors.chunks(name)):
            raise ValueError(f"{which} has NaN or infinite values in {own!r}.")

    @staticmethod
    def _check_tied(tensors: Tensors, names: list[str], which: str) -> None:
        for other in names[1:]:
            same_shape = tensors.shapes[other] == tensors.shapes[names[0]]
            if not same_shape or not all(map(torch.equal, tensors.chunks(names[0]), tensors.chunks(other))):
                raise ValueError(f"{which} has two tensors for {names[0]!r} and {other!r}, which share one in `model`.")

    def _opened(self, given: Given, which: str) -> tuple[Tensors, bool]:
        """Its tensors, and whether it should have all of the model's."""
        if isinstance(given, nn.Module):
            if type(given) is not type(self.model):
                kinds = f"{type(given).__name__}, `model` is a {type(self.model).__name__}"
                raise ValueError(f"{which} is a {kinds}: members have one architecture.")
            self._check_labels(getattr(getattr(given, "config", None), "id2label", None), which)
            return InMemory(given.state_dict()), True
        if isinstance(given, Mapping):
            strange = [name for name, value in given.items() if not _is_plain(value)]
            if strange or not given:
                raise ValueError(f"{which} must be a state dict of plain tensors, got others in {strange[:3]}.")
            return InMemory(given), False
        if isinstance(given, str | os.PathLike):
            return self._from_disk(Path(given), which)
        if isinstance(given, InFiles | InMemory | Renamed):
            return given, False
        raise TypeError(f"{which} must be a folder, a state dict or a torch.nn.Module, got {type(given).__name__}.")

    def _from_disk(self, path: Path, which: str) -> tuple[Tensors, bool]:
        if path.is_file():
            return InFiles([path]), False
        if not path.is_dir():
            raise ValueError(f"{which}: there is no folder {str(path)!r}.")
        if (path / "config.json").is_file():
            self._check_config(json.loads((path / "config.json").read_text()), which)
        if (path / _ADAPTER).is_file():
            return InFiles([path / _ADAPTER]), False
        if (path / _INDEX).is_file():
            shards = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
            return self._with_own_names(InFiles(path / shard for shard in shards), path), True
        if (path / _SINGLE).is_file():
            return self._with_own_names(InFiles([path / _SINGLE]), path), True
        raise ValueError(f"{which}: {str(path)!r} holds no weights in safetensors files.")

    def _with_own_names(self, tensors: Tensors, path: Path) -> Tensors:
        """As they are; where transformers saves a model under other names, as it reads them: whole, into memory."""
        loader = getattr(type(self.model), "from_pretrained", None)
        known = {name for names in self.spellings.values() for name in names}
        if loader is None or hasattr(self.model, "peft_config") or not set(tensors.shapes) - known:
            return tensors
        try:
            loaded, info = loader(path, output_loading_info=True)
        except (RuntimeError, ValueError, OSError):  # another size, which the names of the files will tell
            return tensors
        is_whole = not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return InMemory(loaded.state_dict()) if is_whole else tensors

    def _check_config(self, config: Mapping[str, Any], which: str) -> None:
        names, own = config.get("architectures"), type(self.model).__name__
        if config.get("bayesian"):
            raise ValueError(f"{which} is converted: it is a posterior, no set of weights.")
        if names and hasattr(self.model, "config") and own not in names and not hasattr(self.model, "peft_config"):
            raise ValueError(f"{which} is a {names[0]}, `model` is a {own}: members have one architecture.")
        self._check_labels(config.get("id2label"), which)

    def _check_labels(self, labels: Mapping[Any, str] | None, which: str) -> None:
        own = getattr(getattr(self.model, "config", None), "id2label", None)
        found = None if labels is None else {int(key): name for key, name in labels.items()}
        if own and found and found != dict(own):
            raise ValueError(f"{which} has the labels {_short(found)}, `model` {_short(own)}: members share them.")


def varying(names: Names, members: list[Tensors]) -> list[str]:
    """Names of the tensors in which a member differs from the model or from another; what a draw has to write.

    Args:
        names: of the model.
        members: under the model's own names.

    Returns:
        The names, in the model's order.

    Raises:
        ValueError: a member lacks such a tensor.
    """
    given = {name for member in members for name in member.shapes}
    found = []
    for name, tensor in names.tensors.items():
        if name not in given:
            continue
        lacking = [index for index, member in enumerate(members) if name not in member.shapes]
        if lacking:
            raise ValueError(f"`members` must have the same tensors: number {lacking[0]} lacks {name!r}.")
        if not all(same_bits(tensor, member.chunks(name)) for member in members):
            found.append(name)
    return found


def _is_plain(value: Any) -> bool:
    is_tensor = type(value) in (Tensor, nn.Parameter)
    return is_tensor and value.layout is torch.strided and not value.is_meta and not value.is_complex()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
