"""The folder of a Bayesian adapter: PEFT's own files, which hold the mean alone, and beside them the posterior.

`bayesian_config.json` says what a reload needs to know, `bayesian_tensors.safetensors` holds each tensor that PEFT's
file lacks: scales, prior centres, and what trains that PEFT leaves out. No unknown tensor stands in PEFT's file, for
servers refuse those. PEFT's method is wrapped when the first model with adapters is met.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..conversion import adapters as converted_adapters
from ..conversion.persistence import peft_state
from ..conversion.record import bayesian_config, conversion_record, converted_module
from ..guarantees.attached import write_guarantees
from ..nn.adapters import AdapterPart, adapter_parts, tuner_layers
from ..nn.base import WIDE_BUFFERS, BayesianModule, is_bayesian
from ..nn.draws import posterior_mean
from ..posteriors import BasePosterior
from ..posteriors.files import saved_kinds
from ..processes.dtensors import is_split, whole
from ..sharding import is_sharded
from ..sharding.gathering import gathered, is_gathered
from ..storage import write

TENSORS, CONFIG, PEFT_CONFIG = "bayesian_tensors.safetensors", "bayesian_config.json", "adapter_config.json"
KIND = "bayesian adapter"
NOTICE = "posterior_is_loaded_by_bayeformers.from_pretrained"
"""A key of `adapter_config.json` that PEFT does not know, and so tells of when it loads the mean."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RHO = "_rho"
ADDED = (RHO, "_prior_centre", *WIDE_BUFFERS)
"""Endings of what a conversion adds, which no file may lack."""
_ADDED_SHAPES = r"Adapter .* LoRA tensor\(s\) have invalid shape"
FACTORS = tuple(f".lora_{matrix}.{name}" for matrix in "AB" for name in "rs")
"""Endings of PEFT's names of the vectors around 1 that a layer of random factors has, such as ScalaBL's."""
VERSION = 1


def wrap_peft() -> None:
    """Let `PeftModel.save_pretrained` save the posterior too; nothing where that is done, or PEFT is not imported."""
    kind: Any = getattr(sys.modules.get("peft"), "PeftModel", None)
    if kind is not None and not hasattr(kind.save_pretrained, "saves_posteriors"):
        kind.save_pretrained = _saving_posterior(kind.save_pretrained)


def added_names(model: nn.Module) -> set[str]:
    """Names in the state dict of what a conversion has added."""
    found: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BayesianModule):
            endings = ("", *ADDED) if getattr(module, "is_factor", False) else ADDED
            own = (f"{key}{ending}" for key in module.specs for ending in endings)
            found |= {f"{name}.{key}".lstrip(".") for key in own}
    return found


def lacking(model: Any, adapters: Collection[str]) -> dict[str, Tensor]:
    """Return by its name each tensor that a reload of ``adapters`` needs and PEFT does not save.

    Args:
        model: a `PeftModel`.
        adapters: the names of those that are meant; what belongs to others alone is left out.
    """
    own = model.state_dict(keep_vars=True)
    seen = {id(tensor) for adapter in adapters for tensor in clean_state(model, adapter).values()}
    meant, others = (
        {id(t) for p in adapter_parts(model) if (p.adapter in adapters) is is_meant for t in _tensors(p)}
        for is_meant in (True, False)
    )
    added, found = added_names(model), {}
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen | (others - meant):
            is_of_prompt = ".prompt_encoder." in f".{name}" and id(tensor) in meant  # PEFT saves what it computes
            if name in added or tensor.requires_grad or is_of_prompt:
                seen.add(id(tensor))
                found[name] = tensor
    return found


def _tensors(part: AdapterPart) -> list[Tensor]:
    """All of an adapter's part, what a conversion has added too; what a head was copied from belongs to no adapter."""
    if part.is_head and part.adapter == "original_module":
        return []
    if not part.is_bare:
        return list(part.module.state_dict(keep_vars=True).values())
    own = {**part.module._parameters, **part.module._buffers}
    names = (part.adapter, *(f"{part.adapter}{ending}" for ending in ADDED))
    return [tensor for name in names if (tensor := own.get(name)) is not None]


def clean_state(model: Any, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves of an adapter, by its names, without what a conversion has added."""
    state = peft_state(model, model.state_dict(keep_vars=True), adapter)
    return {name: tensor for name, tensor in state.items() if not name.endswith((*ADDED, *FACTORS))}


def _clean(folder: Path) -> None:
    """Rewrite PEFT's file of an adapter without what a conversion has added."""
    for name in ADAPTER_FILES:
        path = folder / name
        if path.is_file():
            is_safe = path.suffix == ".safetensors"
            tensors = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
            kept = {key: value for key, value in tensors.items() if not key.endswith((*ADDED, *FACTORS))}
            partial = path.with_name(f"{name}.{os.getpid()}.partial")
            save_file(kept, partial, {"format": "pt"}) if is_safe else torch.save(kept, partial)
            partial.replace(path)


def _saving_posterior(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if is_sharded(self) and not is_gathered(self) and "state_dict" not in given:
            told = _probed(self.get_base_model(), None).values()
            with gathered(self, adapters_only=True, also=told) as writes_here:
                if writes_here:
                    self.save_pretrained(save_directory, *args, **kwargs)
            return
        writes = given.get("is_main_process", True) and not Path(save_directory).is_file()
        if writes:
            write_guarantees(self, Path(save_directory))
        if not is_bayesian(self) or conversion_record(self) is None or _is_sharded(self):
            original(self, save_directory, *args, **kwargs)
            if writes:
                _save_fitted(self, Path(save_directory))
            return
        names = list(given.get("selected_adapters") or self.peft_config)
        with torch.no_grad(), posterior_mean(self), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_ADDED_SHAPES)  # PEFT takes floors and vectors for lost shards
            original(self, save_directory, *args, **kwargs)  # of prompts it saves what their encoder computes
        if writes:
            write_posterior(self, Path(save_directory), names)

    save_pretrained.saves_posteriors = True  # type: ignore[attr-defined]
    return save_pretrained


def _is_sharded(model: nn.Module) -> bool:
    """In a way that leaves its adapters in parts here: by DeepSpeed, FSDP1, or with a state gathered before."""
    kinds = ("FlatParameter",) if is_gathered(model) else ("DTensor", "FlatParameter")
    return any(type(p).__name__ in kinds or hasattr(p, "ds_shape") for p in model.parameters())


def write_posterior(model: Any, folder: Path, adapters: list[str]) -> None:
    """Write the posterior beside PEFT's files: into the folder that of all adapters, and to each adapter its own.

    Args:
        model: a converted `PeftModel`.
        folder: where PEFT has saved it.
        adapters: the names of those that it has saved.
    """
    for name in saved_kinds():
        (folder / name).unlink(missing_ok=True)
    _write(model, folder, adapters)
    for adapter in adapters:
        own = folder if adapter == "default" else folder / adapter
        _clean(own)
        if own != folder:
            _write(model, own, [adapter])
        path = own / PEFT_CONFIG
        content = json.loads(path.read_text()) | {NOTICE: True}
        path.write_text(json.dumps(content, indent=2, sort_keys=True))


def _write(model: Any, folder: Path, adapters: list[str]) -> None:
    write(folder / TENSORS, lacking(model, adapters), {}, kind=KIND)
    _write_config(folder, _described(model, adapters))


def _described(model: Any, adapters: list[str]) -> dict[str, Any]:
    config, root = bayesian_config(model), converted_module(model)
    at = next(name for name, module in model.named_modules() if module is root)
    others = [part for part in adapter_parts(root) if part.adapter not in adapters and not part.is_bare]
    inside = tuple(f"{part.name}." for part in others if part.adapter != "original_module")
    parameters = {name: [k for k in keys if k in adapters] for name, keys in config.parameters.items()}
    modules = {
        name: kind
        for name, kind in config.modules.items()
        if not f"{name}.".startswith(inside or ("\0",)) and parameters.get(name, True)
    }
    data = config.to_dict() | {"modules": modules, "parameters": {n: keys for n, keys in parameters.items() if keys}}
    return {
        **_of_plain(model, adapters),
        "bayesian": data,
        "converted": at,
        "trains": sorted(name for name, p in model.named_parameters() if p.requires_grad),
    }


def _active(model: Any) -> list[str]:
    active: list[str] = model.active_adapters  # `active_adapter` misses what `base_model.set_adapter` switched
    return list(active)


def described_base(base: nn.Module) -> dict[str, Any]:
    """Return what tells a base model from others: class, labels, sizes of its layers, and some of its weights.

    Args:
        base: plain, or with adapters inside.
    """
    kind = next(cls for cls in type(base).__mro__ if not issubclass(cls, BayesianModule))
    config = getattr(base, "config", None)
    labels = {
        key: value
        for key in ("id2label", "label2id", "problem_type", "pad_token_id")
        if (value := getattr(config, key, None)) is not None
    }
    sizes = sorted(_sizes(base))
    return {
        "class": kind.__name__,
        "labels": labels,
        "layers": len(sizes),
        "sizes": hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16],
        "probe": probe(base),
    }


_SIZES = ("in_features", "out_features", "num_embeddings", "embedding_dim", "nf")


def _sizes(base: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Of the base's own layers, by the names that they have without adapters; their logical sizes, if quantised too."""
    inside = {id(module) for part in adapter_parts(base) for module in part.module.modules() if not part.is_head}
    inside |= {id(layer) for _, layer in tuner_layers(base)}
    for name, module in base.named_modules():
        if id(module) not in inside and ".modules_to_save." not in name:
            found = [int(size) for key in _SIZES if isinstance(size := vars(module).get(key), int)]
            if found:
                yield _own_name(name), found


def _own_name(name: str) -> str:
    """As it is without adapters."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name)


def probe(base: nn.Module, names: Collection[str] | None = None) -> dict[str, Any]:
    """Return a few numbers of a few of the base's matrices, by their names without adapters.

    Args:
        base: plain, or with adapters inside; of one with a merged adapter nothing is returned.
        names: of the matrices, those that ``base`` has in floating point; None: three of the frozen ones.
    """
    own = _probed(base, names)
    return {n: {"dtype": str(p.dtype), "values": whole(p)[-1, :4].detach().float().tolist()} for n, p in own.items()}


def _probed(base: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    if any(layer.merged for _, layer in tuner_layers(base)):
        return {}
    inside = {id(p) for part in adapter_parts(base) for p in part.parameters()}
    matrices = {
        _own_name(name): p
        for name, p in base.named_parameters()
        if id(p) not in inside and p.dim() == 2 and p.is_floating_point() and not p.is_meta
        if type(p) is nn.Parameter or is_split(p)
    }
    if names is None:
        frozen = sorted(n for n, p in matrices.items() if not p.requires_grad and not n.endswith("_rho"))
        names = frozen[:: max(len(frozen) // 3, 1)][:3]
    return {name: matrices[name] for name in names if name in matrices}


def _save_fitted(model: Any, folder: Path) -> None:
    """The posterior of a plain model with adapters: its ``posterior``, or what its Trainer has saved there."""
    (folder / TENSORS).unlink(missing_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    own = vars(model).get("posterior")
    if isinstance(own, BasePosterior) and own.file_name and own.model is model:
        own.save(folder)
    if any((folder / name).is_file() for name in saved_kinds()):
        _write_config(folder, _of_plain(model, list(model.peft_config)))


def _of_plain(model: Any, adapters: list[str]) -> dict[str, Any]:
    active = [name for name in _active(model) if name in adapters]
    return {
        "version": VERSION,
        "adapters": {name: {"inference_mode": bool(model.peft_config[name].inference_mode)} for name in adapters},
        "active": active or adapters[:1],
        "base": described_base(model.get_base_model()),
    }


def _write_config(folder: Path, content: Mapping[str, Any]) -> None:
    partial = folder / f"{CONFIG}.{os.getpid()}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(folder / CONFIG)


converted_adapters.listeners.append(wrap_peft)
wrap_peft()
