"""The weights of a checkpoint, into the model that trains: every tensor by the model's own names, and verified.

transformers writes many models' weights under the names of their first release and renames them in `from_pretrained`;
its Trainer reads a checkpoint by the model's names, and leaves out what it does not find.
"""

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..checkpoint.adapters import ADDED, CONFIG, RHO
from ..conversion.record import conversion_record
from ..nn.base import variational_tensors
from ..processes.dtensors import own_part, part_of, reshard, split_like

__all__ = ["check_same_conversion", "recorded_config", "restore", "unwrapped", "weight_files"]

RESUMED = "`resume_from_checkpoint`"
_COMPARED = ("delta", "freeze", "prior", "estimator", "modules", "padding")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_COMPILED = "_orig_mod."  # before the names of a model that was given to the Trainer compiled
_MOVED = r"(^|\.)position_ids$|rotary_emb\.inv_freq$"  # buffers that older versions of transformers saved


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel and `torch.compile`."""
    inner: nn.Module = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner


def saved_module(model: nn.Module) -> nn.Module:
    """Whose tensors a folder's weights file holds: the model's, or those of the one inside a sentence-transformer."""
    model = unwrapped(model)
    inner = getattr(model, "transformers_model", None)
    if isinstance(inner, nn.Module) and {*model.parameters()} == {*inner.parameters()}:
        return inner
    return model


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a checkpoint's weights, one or several shards; none if there are none."""
    path = Path(folder)
    for name in _SINGLE:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return [path / shard for shard in sorted(set(shards.values()))]
    return []


@torch.no_grad()
def restore(model: nn.Module, folder: str | os.PathLike[str], what: str = RESUMED) -> None:
    """Write a checkpoint's weights into ``model``: every tensor of the one, every tensor of the other.

    Args:
        model: where they go, unwrapped; its Parameters stay the same objects.
        folder: written by `Trainer` or `save_pretrained`, under whatever names that gives the weights.
        what: what the folder is, for the error.

    Raises:
        RuntimeError: a tensor of the model is not the checkpoint's afterwards. A ValueError comes before anything
            changes: the checkpoint lacks a tensor of the model or has another, a shape differs, or two names that share
            one tensor in the model have two values.
    """
    raw: dict[str, Tensor] = {}
    for file in weight_files(folder):
        raw |= {name.removeprefix(_COMPILED): value for name, value in read(file).items()}
    found, unknown = _by_own_names(model, raw)
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    unknown += [name for name in found if name not in own]
    _check(model, own, found, unknown, f"{what} {str(folder)!r}")
    check_same_conversion(model, folder, what)
    reshard(model)
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    parts = {name: split_like(value, own[name]) if name in own else value for name, value in found.items()}
    model.load_state_dict(parts, strict=False)
    differing = [name for name, value in found.items() if name in own and not same(own[name], value)]
    if differing:
        raise RuntimeError(
            f"{what} {str(folder)!r} was read, but {len(differing)} tensors of the model are not the checkpoint's, "
            f"such as {differing[:3]}: a hook of theirs changes what is loaded."
        )


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if file.suffix == ".safetensors":
        return load_file(file)
    tensors: dict[str, Tensor] = torch.load(file, "cpu", weights_only=True)
    return tensors


def _by_own_names(model: nn.Module, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors as `from_pretrained` would name, split and join them; and names that become none."""
    if not isinstance(model, PreTrainedModel):
        return raw, []
    own = model.state_dict()
    transforms = _transforms(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, Any] = {}
    unknown = []
    for key in sorted(raw, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters)
        if name not in own:  # a name that is the model's own needs no prefix; transformers asks for one first
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, own)
        if name not in own or (pattern is None and name in collected):
            unknown.append(key)
            continue
        if name not in collected:
            new = WeightRenaming(key, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
            collected[name] = new
        collected[name].add_tensor(name, key, key if pattern is None else pattern, raw[key])
    found = {}
    for name, transform in collected.items():
        for target, value in _converted(transform, name, model).items():
            found[target] = value[0] if isinstance(value, list) else value
    return found, unknown


def _converted(transform: Any, name: str, model: PreTrainedModel) -> dict[str, Any]:
    try:
        values: dict[str, Any] = transform.convert(name, model=model, config=model.config)
    except Exception as error:  # each of its operations fails in its own way
        raise ValueError(
            f"transformers cannot make {name!r} of {type(model).__name__} of what the checkpoint holds: {error}"
        ) from error
    return values


def _transforms(model: PreTrainedModel) -> list[Any]:
    """How transformers reads the model's files; those of a ``key_mapping`` that it was loaded with come first."""
    known = get_model_conversion_mapping(model)
    patterns = [(t.source_patterns, t.target_patterns) for t in known]
    own: Iterable[Any] = getattr(model, "_weight_conversions", None) or ()
    return [t for t in own if (t.source_patterns, t.target_patterns) not in patterns] + known


def _check(
    model: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor], unknown: list[str], what: str
) -> None:
    filled = {id(own[name]) for name in found if name in own}
    missing = [name for name, tensor in own.items() if name not in found and id(tensor) not in filled]
    missing = sorted(_besides(missing, model, "_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing"))
    unknown = sorted(_besides(unknown, model, "_keys_to_ignore_on_load_unexpected"))
    unknown = [name for name in unknown if not re.search(_MOVED, name)]
    is_converted = next(variational_tensors(model), None) is not None
    scales = [name for name in unknown if name.endswith(RHO)]
    if scales and not is_converted:
        raise ValueError(unconverted(what, scales))
    if missing or unknown:
        raise ValueError(misfit(what, missing, unknown))
    _check_values(own, found, what)


def unconverted(what: str, scales: list[str]) -> str:
    """The error where only the checkpoint has scales."""
    return (
        f"{what} holds the scales of {len(scales)} Bayesian tensors, but the model is not converted: call "
        "`to_bayesian(model)` as in that training, then make the trainer."
    )


def misfit(what: str, missing: list[str], unknown: list[str]) -> str:
    """Return the error's text where checkpoint and model do not have the same tensors.

    Args:
        what: the checkpoint.
        missing: names that only the model has.
        unknown: names that only the checkpoint has.
    """
    by_scale = any(name.endswith(RHO) for name in missing + unknown)
    fits, remedy = ("model's conversion", "Convert the same layers") if by_scale else ("model", "Make the model")
    return (
        f"{what} does not fit the {fits}: it lacks {_some(missing)} ({len(missing)}) and has {_some(unknown)} "
        f"({len(unknown)}) besides. {remedy} as in that training."
    )


def _some(names: list[str]) -> list[str]:
    """Scales first: they tell of another conversion."""
    return sorted(names, key=lambda name: (not name.endswith(RHO), name))[:3]


def _besides(names: list[str], model: nn.Module, *attributes: str) -> list[str]:
    """Those that no pattern of the model's excuses; it means the model's own tensors, not what ours are named after."""
    patterns = [pattern for attribute in attributes for pattern in getattr(model, attribute, None) or ()]
    return [n for n in names if n.endswith(ADDED) or not any(re.search(pattern, n) for pattern in patterns)]


def _check_values(own: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    first: dict[int, str] = {}
    for name, value in found.items():
        if own[name].shape != value.shape:
            raise ValueError(
                f"{what} has {name!r} of shape {tuple(value.shape)}, the model {tuple(own[name].shape)}: make the "
                "model as in that training."
            )
        other = first.setdefault(id(own[name]), name)
        if not same(found[other], value):
            raise ValueError(
                f"{what} has two tensors for {other!r} and {name!r}, which share one in the model: it was trained with "
                "weights that were not tied. Make the model as in that training."
            )


def same(tensor: Tensor, value: Tensor) -> bool:
    """Equal in the dtype of ``tensor``, NaNs included."""
    expected = part_of(value.to(tensor.device, tensor.dtype), tensor)
    tensor = own_part(tensor)
    return torch.equal(tensor, expected) or bool(((tensor == expected) | (tensor.isnan() & expected.isnan())).all())


def recorded_config(checkpoint: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The "bayesian" entry of a checkpoint's `config.json`, or of an adapter's `bayesian_config.json`; None: none."""
    path = Path(checkpoint) / "config.json"
    path = path if path.is_file() else Path(checkpoint) / CONFIG
    recorded: dict[str, Any] | None = json.loads(path.read_text()).get("bayesian") if path.is_file() else None
    return recorded


def check_same_conversion(model: nn.Module, folder: str | os.PathLike[str], what: str = RESUMED) -> None:
    """Check that the checkpoint's model was converted as ``model`` was.

    Args:
        model: unwrapped.
        folder: the checkpoint.
        what: what the folder is, for the error.

    Raises:
        ValueError: it was not.
    """
    recorded, record = recorded_config(folder), conversion_record(model)
    if recorded is None or record is None:
        return
    present = json.loads(json.dumps(record.config.to_dict()))
    for key in _COMPARED:
        is_known = key != "padding" or None not in (recorded.get(key), present[key])  # no entry of older versions
        if is_known and recorded.get(key) != present[key]:
            raise ValueError(
                f"{what} {str(folder)!r} was trained with {key}={recorded.get(key)!r}, the model "
                f"was converted with {key}={present[key]!r}: the prior would change in mid-training."
            )
