"""`bayeformers.from_pretrained` of an adapter's folder: its base, PEFT's adapter, and the posterior beside it.

Every tensor is accounted for: what PEFT's files hold, and what lies beside them, is what the model holds afterwards.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from ..conversion.config import BayesianConfig
from ..conversion.convert import convert
from ..nn.adapters import adapter_parts
from ..nn.base import variational_tensors
from ..posteriors.files import saved_kinds
from ..storage import read, tensor_names
from . import adapters as saved
from .accounting import Files, NotBayesian

_OWN = "posterior"


def is_adapter(files: Files) -> bool:
    """Whether a folder holds adapters of PEFT's, and no whole model."""
    if files.weights():
        return False
    return files.find(saved.PEFT_CONFIG) is not None or files.find(saved.CONFIG) is not None


def load_adapter(files: Files, architecture: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Return the `PeftModel` with its posterior.

    Args:
        files: of the folder.
        architecture: the function that finds the class that a configuration names.
        hub: arguments of the download.
        kwargs: ``base_model``, a model or where it is loaded from, and else as for the base's `from_pretrained`.

    Raises:
        ValueError: the base is missing or another one, or the folder is damaged.
        NotBayesian: the folder has no posterior.
    """
    import peft  # an extra

    saved.wrap_peft()
    directory = files.directory
    content = _content(files)
    fitted = {name: path for name in saved_kinds() if (path := files.find(name)) is not None}
    path = files.find(saved.TENSORS)
    if "bayesian" in content and path is None:
        raise ValueError(f"`directory` {directory!r} lacks {saved.TENSORS!r}, the scales of its Bayesian adapter.")
    if "bayesian" not in content and not fitted:
        raise NotBayesian(_without(files))
    config = _record(content, directory) if "bayesian" in content else None
    tensors = read(path, kind=saved.KIND)[0] if config is not None and path is not None else {}
    configs = {name: _peft_config(files, name, peft) for name in content["adapters"]}
    base, missing = _base(next(iter(configs.values())), content, architecture, hub, kwargs)
    at = content.get("converted", "")
    if config is not None and _is_of_base(config, base, at):
        convert(base, config)
        config = None
    model = _with_adapters(base, configs, content, files, peft)
    _check_head(model, missing)
    if config is not None:
        convert(model.get_submodule(at), config)
    _fill(model, tensors, content, files)
    if fitted and "bayesian" not in content:
        name = next(iter(fitted))
        model.__dict__[_OWN] = saved_kinds()[name].load(Path(fitted[name]), model)
    return model.eval()


def _content(files: Files) -> dict[str, Any]:
    """What `bayesian_config.json` says; where a posterior was saved by hand, there is none."""
    path, default = (
        files.find(saved.CONFIG),
        {"adapters": {"default": {"inference_mode": False}}, "active": ["default"]},
    )
    if path is None:
        return default
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or not isinstance(content.get("adapters"), dict) or not content["adapters"]:
            raise ValueError("it names no adapters")
    except ValueError as error:
        raise ValueError(f"{path!r} is damaged: {error}. Restore the file that was saved with the adapter.") from error
    if not isinstance(content.get("version"), int) or content["version"] > saved.VERSION:
        raise ValueError(f"{path!r} has version {content.get('version')!r}: upgrade bayeformers.")
    return content


def _record(content: Mapping[str, Any], directory: str) -> BayesianConfig:
    try:
        return BayesianConfig.from_dict(content["bayesian"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{saved.CONFIG!r} in {directory!r} is damaged: {error}.") from error


def _without(files: Files) -> str:
    rho = ""
    if (path := files.find("adapter_model.safetensors")) is not None:
        rho = "; its scales lie in PEFT's own file, as an earlier bayeformers saved them" * any(
            name.endswith("_rho") for name in tensor_names(path)
        )
    return (
        f"`directory` {files.directory!r} is a PEFT adapter without a posterior: it has no {saved.CONFIG!r} with "
        f"{saved.TENSORS!r}, nor the file of a Laplace or other posterior{rho}. Load it with `peft`, and call "
        "`to_bayesian`, or fit a posterior with `BayesianTrainer.fit_laplace`."
        + (" Then `peft.set_peft_model_state_dict(model, peft.load_peft_weights(directory))`." if rho else "")
    )


def _peft_config(files: Files, name: str, peft: Any) -> Any:
    path = files.find(f"{name}/{saved.PEFT_CONFIG}") if name != "default" else None
    path = path or files.find(saved.PEFT_CONFIG)
    if path is None:
        raise ValueError(f"`directory` {files.directory!r} lacks {saved.PEFT_CONFIG!r} of its adapter {name!r}.")
    try:
        values = json.loads(Path(path).read_text())
        values.pop(saved.NOTICE, None)
        config = peft.PeftConfig.from_peft_type(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path!r} is damaged, or of a newer PEFT: {error}.") from error
    return config


# -- the base ---------------------------------------------------------------------------------------------------------


def _base(
    config: Any, content: Mapping[str, Any], architecture: Any, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    """The base, and names of its weights that no checkpoint held."""
    given = kwargs.pop("base_model", None)
    missing: set[str] = set()
    if isinstance(given, nn.Module):
        if kwargs:
            raise ValueError(f"With a model as `base_model` there is nothing to load with {sorted(kwargs)}.")
        base: nn.Module = given
    else:
        base, missing = _loaded_base(
            given or config.base_model_name_or_path, config, content, architecture, hub, kwargs
        )
    expected = content.get("base")
    if expected is not None:
        _check_base(base, expected)
    return base, missing


def _loaded_base(
    name: Any, peft_config: Any, content: Mapping[str, Any], architecture: Any, hub: Any, kwargs: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    if not name:
        raise ValueError(
            "`base_model` is needed: the adapter's configuration does not say which model it is of. Give a model, or "
            "where it is loaded from."
        )
    hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    rest = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
    try:
        config = AutoConfig.from_pretrained(name, revision=peft_config.revision, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The adapter's base {str(name)!r} could not be loaded: give `base_model`, a model or where it is loaded "
            f"from. ({str(error).splitlines()[0]})"
        ) from error
    expected = content.get("base", {})
    for key, value in expected.get("labels", {}).items():
        setattr(config, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)
    if expected.get("class"):
        config.architectures = [expected["class"]]
    kind = architecture(config, name, hub) if expected.get("class") else _auto_class(peft_config, transformers)
    rest.pop("variant", None)
    rest |= {"config": config, "revision": peft_config.revision, "output_loading_info": True}
    loaded: Any = kind.from_pretrained(name, **rest)
    return loaded[0], set(loaded[1]["missing_keys"])


def _auto_class(config: Any, library: Any) -> Any:
    """Of an adapter that was saved without our record: by PEFT's kind of task."""
    from peft import auto

    kinds = [kind for kind in vars(auto).values() if getattr(kind, "_target_class", None) is not None]
    wanted = auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type)
    found = next((kind._target_class for kind in kinds if kind._target_peft_class is wanted and wanted), None)
    named = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    return found or getattr(library, named, library.AutoModel)


def _check_base(base: nn.Module, expected: Mapping[str, Any]) -> None:
    """Raise ValueError for another model than the adapter was made on."""
    own = saved.described_base(base)
    if own["class"] != expected["class"]:
        raise ValueError(f"The adapter was made on a {expected['class']}, but `base_model` is a {own['class']}.")
    if own["sizes"] != expected["sizes"]:
        raise ValueError(
            f"The adapter was made on another {expected['class']}: the layers of `base_model` ({own['layers']}, the "
            f"adapter's had {expected['layers']}) have other sizes."
        )
    probed = saved.probe(base, list(expected["probe"]))
    for name, values in probed.items():
        before = expected["probe"][name]
        near = 0.0 if values["dtype"] == before["dtype"] else 0.02
        pairs = zip(values["values"], before["values"], strict=True)
        if not all(math.isclose(one, other, rel_tol=near, abs_tol=near / 10) for one, other in pairs):
            raise ValueError(
                f"The adapter was made on another model than `base_model`: {name!r} has other values. Its posterior "
                "would be of other weights."
            )


# -- adapter and posterior --------------------------------------------------------------------------------------------


def _is_of_base(config: BayesianConfig, base: nn.Module, at: str) -> bool:
    """Whether the base was converted before PEFT adapted it: its layers have their own names in the record."""
    return at != "" and set(config.modules) <= {name for name, _ in base.named_modules()}


def _with_adapters(
    base: nn.Module, configs: Mapping[str, Any], content: Mapping[str, Any], files: Files, peft: Any
) -> Any:
    model: Any = None
    for name, config in configs.items():
        config.inference_mode = bool(config.is_prompt_learning and content["adapters"][name].get("inference_mode"))
        weights = _weights(files, name)
        is_wide = not any(t.dtype in (torch.float16, torch.bfloat16) for t in weights.values())
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=is_wide)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=is_wide)
        if not config.is_prompt_learning or "bayesian" not in content:
            peft.set_peft_model_state_dict(model, _of_random_heads(model, name) | weights, adapter_name=name)
    active = content["active"]
    if len(configs) > 1:
        model.set_adapter(active[0]) if len(active) == 1 else model.base_model.set_adapter(active)
    return model


def _of_random_heads(model: Any, adapter: str) -> dict[str, Tensor]:
    """What PEFT asks a file for of a Bayesian head, though it lies beside: as it is now."""
    found: dict[str, Tensor] = {}
    for part in adapter_parts(model):
        if part.is_head and part.adapter == adapter:
            state = part.module.state_dict()
            own = {f"{part.container.removesuffix('.modules_to_save')}.{name}": t for name, t in state.items()}
            found |= {name: t for name, t in own.items() if name.endswith(saved.ADDED)}
    return found


def _weights(files: Files, name: str) -> dict[str, Tensor]:
    for ending in saved.ADAPTER_FILES:
        places = [ending] if name == "default" else [f"{name}/{ending}", ending]
        path = next((found for place in places if (found := files.find(place)) is not None), None)
        if path is not None:
            try:
                return load_file(path) if ending.endswith("s") else torch.load(path, "cpu", weights_only=True)
            except Exception as error:
                raise ValueError(f"{path!r} is damaged: {error}.") from error
    raise ValueError(f"`directory` {files.directory!r} lacks the weights of its adapter {name!r}.")


@torch.no_grad()
def _fill(model: Any, tensors: Mapping[str, Tensor], content: Mapping[str, Any], files: Files) -> None:
    """Write what lies beside PEFT's files into a converted model, verify all of it, and restore which of it trains."""
    if "bayesian" in content:
        _same_centres(model, tensors)
        own = model.state_dict(keep_vars=True)
        expected = {n for n in saved.lacking(model, list(content["adapters"])) if n.endswith(saved.ADDED)}
        unfit = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
        if missing := sorted(expected - tensors.keys()):
            raise ValueError(_damaged(files, f"lacks {missing[:3]} ({len(missing)})"))
        if unfit:
            raise ValueError(_damaged(files, f"has {sorted(unfit)[:3]} ({len(unfit)}), which are not of this model"))
        if broken := [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]:
            raise ValueError(_damaged(files, f"has NaN or infinite values in {sorted(broken)[:3]} ({len(broken)})"))
        for name, value in {**tensors, **_of_heads(model, content, files)}.items():
            own[name].copy_(value)
        trains = set(content.get("trains", ()))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (name in trains):
                parameter.requires_grad_(name in trains)
    for name in content["adapters"]:
        _verify(model, name, files)


def _of_heads(model: Any, content: Mapping[str, Any], files: Files) -> dict[str, Tensor]:
    """By the model's names, what PEFT's files hold beside prompts, which are computed: the heads."""
    found: dict[str, Tensor] = {}
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for adapter in content["adapters"]:
        if model.peft_config[adapter].is_prompt_learning:
            state, weights = saved.clean_state(model, adapter), _weights(files, adapter)
            found |= {names[id(t)]: weights[n] for n, t in state.items() if id(t) in names and n in weights}
    return found


def _same_centres(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Store the prior's centres of those tensors whose centre was stored, and of no others."""
    names = {id(module): name for name, module in model.named_modules()}
    for tensor in variational_tensors(model):
        module, key = tensor.module, f"{tensor.parameter_name}_prior_centre"
        path = f"{names[id(module)]}.{key}".lstrip(".")
        if path in tensors and key not in module._buffers:
            module.register_buffer(key, tensors[path].to(tensor.loc.device, copy=True))
        elif path not in tensors and module.prior_scale(tensor.parameter_name) is None:
            module.drop_centre(tensor.parameter_name)


def _verify(model: Any, adapter: str, files: Files) -> None:
    """Raise ValueError where the model does not hold what PEFT's file of an adapter has."""
    weights = _weights(files, adapter)
    own = model.state_dict()  # PEFT adds the base's embeddings, by their own names, where the adapter is on one of them
    state = {name: own[name] for name in weights if name in own} | saved.clean_state(model, adapter)
    for verb, names in (("lacks", state.keys() - weights.keys()), ("has besides", weights.keys() - state.keys())):
        if names:
            raise ValueError(_damaged(files, f"{verb} {sorted(names)[:3]} ({len(names)})"))
    is_computed = model.peft_config[adapter].is_prompt_learning  # by the prompt's encoder, perhaps on another device
    for name, value in weights.items():
        held = state[name].to(value.device)
        given = value.to(held.dtype)  # a base loaded in bfloat16 holds its heads rounded
        is_same = held.shape == given.shape and (
            torch.allclose(held, given) if is_computed else torch.equal(held, given)
        )
        if not is_same:
            raise ValueError(_damaged(files, f"has {name!r}, which PEFT did not take up"))


def _damaged(files: Files, what: str) -> str:
    return (
        f"The adapter in {files.directory!r} is not what was saved with its posterior: it {what}. Restore all files of "
        "the folder that were saved together."
    )


def _check_head(model: nn.Module, missing: set[str]) -> None:
    """Raise ValueError for weights that neither the base's checkpoint nor the adapter has: they would be random."""
    heads = {part.container.removesuffix(".modules_to_save") for part in adapter_parts(model) if part.is_head}
    heads = {name.removeprefix("base_model.").removeprefix("model.") for name in heads}
    heads |= {f"model.{name}" for name in heads}
    lost = sorted(name for name in missing if not any(name.startswith(f"{head}.") for head in heads))
    if lost:
        raise ValueError(
            f"The adapter's base lacks {lost[:3]} ({len(lost)}), which the adapter's folder does not hold: they would "
            "be random. Give the trained model as `base_model`; or name the head in PEFT's `modules_to_save`."
        )
