"""`export_draws`: draws of an adapter's posterior as ordinary PEFT folders, which servers of several adapters read.

A draw of a LoRA adapter is itself a LoRA adapter: the same shapes, other values. So S folders are the posterior, cut
down to S of its draws, for whatever loads adapters and knows nothing of bayeformers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_draw
from ..conversion.persistence import ENDINGS, peft_state
from ..posteriors import Posterior
from ..posteriors.predict import as_posterior
from ..storage import digest, folder

__all__ = ["export_draws"]

Format = Literal["peft"]

_WEIGHTS = "adapter_model.safetensors"
_BASE_STAYS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""LoRA's initialisations that leave the base's weights as they are."""


def export_draws(
    posterior: Posterior | nn.Module,
    num_draws: int,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    format: Format = "peft",
) -> list[Path]:
    """Write draws of a LoRA adapter's posterior as ordinary adapter folders, one a draw.

    Folder s holds the adapter under draw s of ``seed``, the network of ``posterior.draw(s, seed)``: the files that PEFT
    writes of it, and nothing of the posterior. Its name is made of the adapter's, the seed, s and a hash of its values,
    such as ``default-seed0-draw003-5f0c1a2b``, so that a server which keeps a prefix by its adapter's name never mixes
    two of them. All folders are written, or none.

    Args:
        posterior: of a `peft.PeftModel` with one active LoRA adapter; or such a model, converted.
        num_draws: how many draws S to write, >= 1.
        directory: where the folders go; it is made if it is not there. Folders of other draws stay.
        seed: of the draws.
        format: "peft", the one there is: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The folders, in the order of the draws.

    Raises:
        TypeError: ``posterior`` is none, or ``directory`` is no path.
        ValueError: a posterior without so many draws, or that is more than draws of weights (a temperature, dropout, a
            mixture); a model without one active LoRA adapter; draws, or trained weights, of what a LoRA folder has no
            place for, such as the base or a head outside of ``modules_to_save``; an adapter that changed its base.
    """
    check_choice("format", format, get_args(Format))
    check_count("num_draws", num_draws, 1)
    check_draw(0, seed)
    path = folder(directory)
    posterior = as_posterior(posterior)
    if posterior.num_draws is not None and num_draws > posterior.num_draws:
        raise ValueError(f"`num_draws` must be at most the posterior's {posterior.num_draws}, got {num_draws}.")
    adapter = _adapter_of(posterior.model)
    held = _held(posterior.model, adapter)
    _check_draws(posterior, held)
    config = _config_of(posterior.model, adapter)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path, prefix=".partial-"))
    try:
        names = [_write(posterior, held, index, seed, config, partial, adapter) for index in range(num_draws)]
        return [_moved(partial / name, path / name) for name in names]
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new and not any(path.iterdir()):
            path.rmdir()


def _adapter_of(model: nn.Module) -> str:
    """The name of the one active adapter, of LoRA, that can be exported."""
    if not hasattr(model, "peft_config") or not hasattr(model, "active_adapters") or not hasattr(model, "base_model"):
        raise ValueError(
            f"`posterior` must be of a `peft.PeftModel`, whose adapter is exported, got one of a "
            f"{type(model).__name__}. Make it by `peft.get_peft_model` and convert its adapter."
        )
    active: Any = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"`posterior` must be of a model with one active adapter, got {active}: call `set_adapter`.")
    adapter = str(active[0])
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(
            f"`posterior` must be of a LoRA adapter, got {adapter!r} of kind {kind}: servers read no other."
        )
    if config.init_lora_weights not in _BASE_STAYS or config.bias != "none":
        raise ValueError(
            f"The adapter {adapter!r} has `init_lora_weights`={config.init_lora_weights!r} and `bias`={config.bias!r}: "
            f"it changed its base, which exported adapters share. Allowed are {_BASE_STAYS} and 'none'."
        )
    _check_layers(model, adapter)
    return adapter


def _check_layers(model: nn.Module, adapter: str) -> None:
    """Raise ValueError where the adapter's files would say something else than the model computes."""
    from peft.tuners.lora import LoraLayer  # an extra

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.scaling:
            continue
        if layer.merged:
            raise ValueError(f"The adapter of {name!r} is merged into its base: call `unmerge_adapter` first.")
        rank, alpha, scaling = layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter]
        expected = alpha / (rank**0.5 if layer.use_rslora[adapter] else rank)
        if abs(scaling - expected) > 1e-6 * abs(expected):
            raise ValueError(
                f"The adapter of {name!r} was scaled to {scaling:.6g} after it was made, and its configuration says "
                f"{expected:.6g}: call `unscale_layer` first, for a folder has no place for it."
            )


@dataclass(frozen=True)
class _Held:
    """A tensor of the adapter's file: the module that owns it and its name there; of a buffer the tensor itself."""

    owner: nn.Module | None
    name: str
    tensor: Tensor

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        """The vectors r and s that multiply a weight's rows and columns in a layer of random factors."""
        is_factored = getattr(self.owner, "is_factor", False) and self.name == "weight"
        own = {} if self.owner is None else self.owner._parameters
        return {name: own[name] for name in ("r", "s") if own.get(name) is not None} if is_factored else {}  # type: ignore[misc]

    @property
    def sources(self) -> set[int]:
        """The ids of the Parameters that it is made of."""
        return {id(self.tensor), *map(id, self.factors.values())}

    def read(self) -> Tensor:
        """Its value; within a draw, that of the draw."""
        if self.owner is None:
            return self.tensor
        value: Tensor = getattr(self.owner, self.name)
        drawn = {name: getattr(self.owner, name) for name in self.factors}
        value = value * drawn["r"][:, None] if "r" in drawn else value
        return value * drawn["s"] if "s" in drawn else value


def _held(model: nn.Module, adapter: str) -> dict[str, _Held]:
    """What the adapter's file holds, by PEFT's names in it."""
    own = model.state_dict(keep_vars=True)
    owners: dict[int, tuple[nn.Module | None, str]] = {}
    for module in model.modules():
        owners.update((id(parameter), (module, name)) for name, parameter in module._parameters.items())
    state = peft_state(model, own, adapter)
    # what the conversion added, which servers refuse: ending names, and factors of a weight
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(ENDINGS)}
    pairs = ((name, tensor, owners.get(id(tensor), (None, ""))) for name, tensor in kept.items())
    found = {name: _Held(owner, own_name, tensor) for name, tensor, (owner, own_name) in pairs}
    factors = {id(factor) for one in found.values() for factor in one.factors.values()}
    saved = {id(tensor) for tensor in state.values()}
    others = {n: t for n, t in own.items() if isinstance(t, Tensor) and id(t) not in saved and not n.endswith(ENDINGS)}
    trained = [name for name, tensor in others.items() if tensor.requires_grad]
    if trained:
        raise ValueError(
            f"{trained[:3]} ({len(trained)}) train too, and a LoRA folder has no place for them: name their modules in "
            "the adapter's `modules_to_save`, or freeze them if they are the base's own."
        )
    return {name: one for name, one in found.items() if id(one.tensor) not in factors}


def _check_draws(posterior: Posterior, held: Mapping[str, _Held]) -> None:
    """Raise ValueError unless draws change some of the tensors that are held, and nothing else."""
    kind = type(posterior).__name__
    if getattr(posterior, "predicts_itself", False):
        raise ValueError(
            f"A {kind} predicts by more than an average over draws, which adapters would not do: export the posterior "
            "inside of it."
        )
    random: Any = list(posterior.random_parameters())  # type: ignore[attr-defined]
    if not random:
        raise ValueError(f"A {kind} draws no weights, so that all adapters would be the same one.")
    known = {source for one in held.values() for source in one.sources}
    names = {id(parameter): name for name, parameter in posterior.model.named_parameters()}
    outside = [names.get(id(parameter), "?") for parameter in random if id(parameter) not in known]
    if outside:
        raise ValueError(
            f"Draws change {outside[:3]} ({len(outside)}), for which a LoRA folder has no place: the base, or a head. "
            "Make the adapter alone random, or name the head in the adapter's `modules_to_save`."
        )


def _config_of(model: Any, adapter: str) -> Any:
    """The adapter's configuration as PEFT writes it, for use and not for training."""
    config = copy.deepcopy(model.peft_config[adapter])
    base = model.get_base_model()
    config.inference_mode, config.init_lora_weights = True, True  # all values are in the file
    config.base_model_name_or_path = config.base_model_name_or_path or vars(base).get("name_or_path") or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return config


def _write(
    posterior: Posterior,
    held: Mapping[str, _Held],
    index: int,
    seed: int,
    config: Any,
    partial: Path,
    adapter: str,
) -> str:
    """Write one draw; returns the name of its folder in ``partial``."""
    with torch.no_grad(), posterior.draw(index, seed):
        tensors = {name: one.read().detach().to("cpu", copy=True).contiguous() for name, one in held.items()}
    wrong = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ValueError(f"Draw {index} of `seed` {seed} has NaN or infinite values in {wrong[:3]} ({len(wrong)}).")
    content = json.dumps(
        [sorted((name, digest(value)) for name, value in tensors.items()), config.to_dict()], default=str
    )
    value = hashlib.sha256(content.encode()).hexdigest()[:8]
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', adapter)}-seed{seed}-draw{index:03d}-{value}"
    (partial / name).mkdir()
    config.save_pretrained(str(partial / name), auto_mapping_dict=config.auto_mapping)
    save_file(tensors, partial / name / _WEIGHTS, metadata={"format": "pt"})
    return name


def _moved(source: Path, target: Path) -> Path:
    """Move a finished folder to its place, over one of the same values that was written before."""
    if target.exists():
        shutil.rmtree(target)
    source.replace(target)
    return target
