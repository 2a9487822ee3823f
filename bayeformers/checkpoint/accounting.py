"""Every tensor of a checkpoint is accounted for: none missing, none unknown, all finite and as they were saved."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import cached_file

from ..conversion.plain_weights import why_not_plain
from ..nn.base import WIDE_BUFFERS, BayesianModule, variational_tensors
from ..nn.draws import bayesian_modules
from ..storage import difference, file_digests, read_digests, tensor_names
from .saving import INDEX, WEIGHTS, digests_name, with_variant

_RHO = "_rho"
_ENDINGS = (_RHO, "_prior_centre", *WIDE_BUFFERS)
_QUANTISING = ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file")


def posterior_like(name: str) -> bool:
    """Whether a tensor of this name belongs to a conversion."""
    return name.endswith(_ENDINGS)


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Before anything is loaded.

    Raises:
        ValueError: an argument would quantise or offload the layers that hold the posterior, or ``dtype`` is unknown.
    """
    for name in _QUANTISING:
        if kwargs.get(name):
            raise ValueError(
                f"`{name}` is not for a Bayesian model, got {type(kwargs[name]).__name__}: the quantised layers would "
                "lose their posterior. Load it in floating point, and use `bayeformers.quantization.quantize`."
            )
    for name in ("dtype", "torch_dtype"):
        value = kwargs.get(name)
        if isinstance(value, str) and value != "auto" and not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f'`{name}` must be a torch.dtype, its name or "auto", got {value!r}.')
    placed = kwargs.get("device_map")
    if "disk" in (placed.values() if isinstance(placed, Mapping) else (placed,)):
        raise ValueError(
            '`device_map` must not offload a Bayesian model to "disk": its KL and its draws need the weights. Give a '
            "device for every part."
        )


class NotBayesian(ValueError):
    """A folder holds a whole model, or a whole adapter, and no posterior."""


class Files:
    """A checkpoint's files, in a folder or on the hub.

    Args:
        directory: the folder, or the name on the hub.
        options: of transformers' download: ``revision``, ``subfolder``, ...
        variant: of the weights.
    """

    def __init__(self, directory: str | os.PathLike[str], options: Mapping[str, Any], variant: str | None) -> None:
        self.directory, self._options, self._variant = str(directory), dict(options), variant
        self.are_verified = False

    def find(self, name: str) -> str | None:
        """The path of one file; None if there is none."""
        quiet = {f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors")}
        found: str | None = cached_file(self.directory, name, **quiet, **self._options)
        return found

    def weights(self) -> list[str]:
        """The safetensors files of the weights; none where they are in another format."""
        single = self.find(with_variant(WEIGHTS, self._variant))
        if single is not None:
            return [single]
        index = self.find(with_variant(INDEX, self._variant))
        if index is None:
            return []
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        return [path for path in map(self.find, names) if path is not None]  # a missing one is the loader's matter

    def check(self, *, has_posterior: bool) -> None:
        """The weights are those that were saved, by their digests; and of a converted model they have scales.

        Raises:
            ValueError: otherwise.
        """
        weights, path = self.weights(), self.find(digests_name(self._variant))
        names = {name for file in weights for name in tensor_names(file)}
        if has_posterior and weights and not any(name.endswith(_RHO) for name in names):
            raise ValueError(_told_plain(self.directory, "all tensors"))
        if not has_posterior and any(name.endswith(_RHO) for name in names):
            raise ValueError(f"The checkpoint in {self.directory!r} is damaged. {self.scales_without_record()}")
        expected = read_digests(path) if path is not None and weights else None
        if expected is None:
            return
        told = difference(file_digests(weights), expected)
        if told is not None:
            raise ValueError(
                f"The checkpoint in {self.directory!r} is not what was saved: of the tensors that were written it "
                f"{told}. If you changed the weights on purpose, remove {digests_name(self._variant)!r} there."
            )
        self.are_verified = True

    def scales_without_record(self) -> str:
        """In words, that there are scales in the weights; empty if there are none."""
        count = sum(name.endswith(_RHO) for file in self.weights() for name in tensor_names(file))
        if not count:
            return ""
        return (
            f"Its weights hold the scales of {count} Bayesian tensors, but its `config.json` has lost the record of "
            "them: restore the one that was saved with these weights. (Of a model that was converted as a part of "
            "another module, or with layers built by hand, there never was one: convert the model itself, or build it "
            "as it was and load its state dict.) "
        )


def told_missing(model: nn.Module, directory: str, missing: Collection[str]) -> str:
    """Return what to say of a checkpoint that lacks some tensors.

    Args:
        model: as it was loaded, with other values for these tensors.
        directory: the checkpoint's folder or its name on the hub, for the message.
        missing: names of the tensors that the checkpoint lacks, one at least.
    """
    scales = sorted(key for key in missing if posterior_like(key))
    if len(scales) < len(missing):
        means = sorted(key for key in missing if not posterior_like(key))
        return (
            f"The checkpoint in {directory!r} lacks {len(means)} weights of the model, such as {means[:3]}: they would "
            "be random. The file is damaged, or of another architecture."
        )
    layers = {name for name in bayesian_modules(model) if any(key.startswith(f"{name}.") for key in scales)}
    whole = {name for name in layers if _lacks_all(model.get_submodule(name), name, set(scales))}
    if whole == layers and len(layers) < len(bayesian_modules(model)):
        return (
            f"The checkpoint in {directory!r} has no scales for {sorted(layers)[:3]} ({len(layers)} of "
            f"{len(bayesian_modules(model))} Bayesian layers), such as {scales[:3]}, though it has those of the "
            "others: these layers were replaced after the conversion, and the model was saved without bayeformers. "
            "Convert the model again after replacing them, or take them out of `bayesian.modules` in its `config.json`."
        )
    return _told_plain(directory, f"{len(scales)} tensors", scales)


def _told_plain(directory: str, what: str, names: Collection[str] = ()) -> str:
    examples = f", such as {sorted(names)[:3]}" if names else ""
    return (
        f"The checkpoint in {directory!r} lacks {what} of its posterior{examples}. It was probably saved again from a "
        "plainly loaded model, which holds the mean only; load that mean with transformers' `from_pretrained`."
    )


def _lacks_all(layer: nn.Module, name: str, missing: set[str]) -> bool:
    assert isinstance(layer, BayesianModule)
    return all(f"{name}.{key}{_RHO}" in missing for key in layer.specs)


def check_values(model: nn.Module, directory: str, *, is_verified: bool) -> None:
    """Check that all weights of a loaded model are in memory and finite, and that unverified scales are not blank.

    Args:
        model: as it was loaded.
        directory: the checkpoint's folder or its name on the hub, for the message.
        is_verified: whether the tensors were compared with the record of what was saved.

    Raises:
        ValueError: a weight is elsewhere, has NaN or infinite values, or a scale that was not verified is all zeros.
    """
    for name, module in model.named_modules():
        if (reason := why_not_plain(module)) is not None:
            raise ValueError(
                f"A Bayesian model must be loaded whole: {name!r} {reason}. Give a `device_map` without offloading."
            )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"The checkpoint in {directory!r} has NaN or infinite values in {name!r}.")
    for layer, module in bayesian_modules(model).items():
        for name, buffer in module.named_buffers(layer, recurse=False):
            if posterior_like(name) and not bool(torch.isfinite(buffer).all()):
                raise ValueError(f"The checkpoint in {directory!r} has NaN or infinite values in {name!r}.")
    for tensor in () if is_verified else variational_tensors(model):
        if tensor.rho.numel() and not bool(tensor.rho.any()):
            raise ValueError(
                f"The checkpoint in {directory!r} holds zeros for the scale of {tensor.name!r}, which no conversion "
                "gives: the file is damaged."
            )
