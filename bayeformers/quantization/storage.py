"""An INT8 posterior in a folder: one file of tensors, and the configuration of a transformers model beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ..checkpoint.load import architecture
from ..conversion.surgery import set_padding_rows
from ..sampling.random_state import preserved
from ..storage import check_whole, folder, read
from .codes import Codes
from .install import Weight, install, kinds, parameter_names, twin
from .laplace_noise import LaplaceNoise
from .noise import MeanFieldNoise, Noise, NoNoise
from .posterior import QuantizedPosterior
from .report import LayerReport, Report
from .saving import FILE, KIND, all_tensors, buffers, floats

_SCALES = ("/scale", "/top", "/step")
_LOADERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any], nn.Module], Noise]] = {
    MeanFieldNoise.kind: MeanFieldNoise.from_saved,
    LaplaceNoise.kind: LaplaceNoise.from_saved,
    NoNoise.kind: lambda tensors, meta, model: NoNoise(),
}


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> QuantizedPosterior:
    """Return the posterior that `QuantizedPosterior.save` wrote; on one machine its predictions are the same bits.

    Args:
        directory: the folder.
        model: for a model that is not of transformers: one of the same structure, whatever its weights. It is not
            changed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the file is missing, damaged, changed or of a newer version; ``model`` is missing, or has other
            layers.

    >>> import tempfile
    >>> from bayeformers.quantization import quantize
    >>> network, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     quantize(network, x).save(folder)
    ...     load(folder, nn.Sequential(nn.Linear(4, 3))).predict(x).probs.shape
    torch.Size([2, 3])
    """
    path = folder(directory)
    tensors, meta = read(path / FILE, kind=KIND)
    skeleton = _skeleton(path, meta) if model is None else model
    if not isinstance(skeleton, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module or None, got {type(model).__name__}.")
    try:
        posterior = _restored(tensors, meta, twin(skeleton)[0].eval())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path / FILE)!r} is damaged: it lacks {error}.") from error
    used, what = all_tensors(posterior.model, posterior.weights, posterior.noise), f"{str(path / FILE)!r}"
    if tensors.keys() - used.keys():
        surplus = sorted(tensors.keys() - used.keys())
        raise ValueError(f"{what} is damaged: its header does not know {surplus[:3]} ({len(surplus)}).")
    checked = {name: value for name, value in used.items() if not name.startswith("buffer:")}
    check_whole(checked, checked, what)
    _check_scales(checked, what)
    return posterior


def _check_scales(tensors: Mapping[str, Tensor], what: str) -> None:
    """Steps and standard deviations; none is negative."""
    for name, value in tensors.items():
        is_scale = name.startswith("step:") or (name.startswith("noise:") and name.endswith(_SCALES))
        if is_scale and bool((value < 0).any()):
            raise ValueError(f"{what} is damaged: {name!r} has negative values.")


def _restored(tensors: Mapping[str, Tensor], meta: Mapping[str, Any], model: nn.Module) -> QuantizedPosterior:
    weights = [
        Weight(
            entry["name"],
            tuple(entry["owners"]),
            entry["arithmetic"],
            getattr(torch, entry["dtype"]),
            Codes(tensors[f"codes:{entry['name']}"], tensors[f"step:{entry['name']}"]),
        )
        for entry in meta["weights"]
    ]
    _tie_as_saved(model, weights, _part(tensors, "float"))
    if "padding" in meta:
        set_padding_rows(model, [name for name, _ in model.named_modules()], meta["padding"])
    _check_weights(model, weights)
    install(model, weights)
    _fill(floats(model), _part(tensors, "float"), "Parameters")
    _fill(buffers(model), _part(tensors, "buffer"), "buffers")
    noise = _LOADERS[meta["noise"]["kind"]](_part(tensors, "noise"), meta["noise"]["meta"], model)
    report = Report([LayerReport(**row) for row in meta["report"]])
    return QuantizedPosterior(
        model, noise, weights, report, problem_type=meta["problem_type"], noise_std=meta["noise_std"]
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.partition(":")[2]: value for name, value in tensors.items() if name.startswith(f"{prefix}:")}


def _tie_as_saved(model: nn.Module, weights: list[Weight], floats: Mapping[str, Tensor]) -> None:
    """Share what was shared: the configuration, of which ``model`` was made, may speak of ties that were none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    firsts = {name: parameters[name] for name in (*(w.name for w in weights), *floats) if name in parameters}
    owned: dict[int, str] = {}
    for name, parameter in firsts.items():
        if owned.setdefault(id(parameter), name) != name:
            firsts[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            _assign(model, name, firsts[name])
    for weight in weights:
        for name in (f"{owner}.weight" for owner in weight.owners):
            shared = firsts.get(weight.name)
            if shared is not None and name in parameters and parameters[name].shape == shared.shape:
                _assign(model, name, shared)


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, key = name.rpartition(".")
    setattr(model.get_submodule(module), key, parameter)


def _check_weights(model: nn.Module, weights: list[Weight]) -> None:
    """Every INT8 weight is one of the model's, of that shape and used by those layers."""
    found, _ = kinds(model)
    names = parameter_names(model)
    users: dict[str, list[str]] = {}
    for layer in found:
        users.setdefault(names[model.get_submodule(layer)._parameters["weight"]], []).append(layer)  # type: ignore[index]
    for weight in weights:
        if users.get(weight.name) != list(weight.owners):
            raise ValueError(
                f"`model` ({type(model).__name__}) is not of the saved structure: the weight {weight.name!r} is of "
                f"{list(weight.owners)} there, and to {users.get(weight.name, 'no such layer')} here."
            )
        shape = tuple(model.get_parameter(weight.name).shape)
        if shape != tuple(weight.codes.codes.shape):
            raise ValueError(
                f"`model` ({type(model).__name__}) has {weight.name!r} of shape {shape}, the file "
                f"{tuple(weight.codes.codes.shape)}."
            )


def _fill(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    if set(targets) != set(saved):
        differ = sorted(set(targets) ^ set(saved))[:3]
        raise ValueError(f"The model has other {what} than the file; these differ: {differ}.")
    for name, target in targets.items():
        if target.shape != saved[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(target.shape)} in the model, {tuple(saved[name].shape)} saved."
            )
        target.data = saved[name]


def _skeleton(path: Path, meta: Mapping[str, Any]) -> nn.Module:
    """A model with fresh weights, of the class and configuration that were saved."""
    name = str(meta.get("model"))
    if not (path / "config.json").is_file():
        is_known = hasattr(transformers, name)
        raise ValueError(f"{str(path)!r} holds a {name!r}, which needs {'its `config.json`.' if is_known else _REMEDY}")
    try:
        config = AutoConfig.from_pretrained(path)
        kind = architecture(config, path, {})
    except ValueError as error:
        raise ValueError(f"{str(path)!r} holds a {name!r}, which needs {_REMEDY}") from error
    with preserved():
        model: PreTrainedModel = kind(config)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


_REMEDY = "`model`: one of the same structure, whatever its weights."
