"""`bayeformers.from_pretrained`: a converted model, or a trained one with its Laplace posterior.

A converted model is read by the stock loader, around a class that converts as it is built. What was saved is
accounted for, tensor by tensor (see `accounting`).
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from ..conversion.config import BayesianConfig
from ..conversion.convert import convert, freeze_as_saved, settle_ties
from ..conversion.record import bayesian_config, update_config
from ..conversion.surgery import swap_class
from ..guarantees.policy import POLICY_FILE
from ..guarantees.saving import take_up_policy
from ..heads.config import HeadConfig
from ..heads.persistence import building, recorded_head, settle
from ..laplace.posterior import FILE
from ..nn.base import WIDE_BUFFERS, BayesianModule, variational_tensors
from ..nn.draws import bayesian_modules
from ..nn.parameters import of_source
from ..posteriors.files import saved_kinds
from .accounting import Files, check_arguments, check_values, posterior_like, told_missing
from .adapter_loading import is_adapter, load_adapter

logger = logging.getLogger(__name__)

_OWN = "posterior"
_DTYPES = ("dtype", "torch_dtype")
_FOLDER = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_HUB_ARGUMENTS = (*_FOLDER, "trust_remote_code")


def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a Bayesian model as it was saved.

    A converted model comes back with its Bayesian layers, scales, priors, ties and frozen means. A model that was saved
    with a Laplace posterior comes back as it was trained, and has the posterior as its attribute ``posterior``, which
    `bayeformers.predict` and `BayesianTrainer` use. An abstention policy of these weights comes back too.

    Args:
        directory: a folder written by `model.save_pretrained` or `trainer.save_model`, or a hub name.
        kwargs: as for transformers' `from_pretrained`: ``dtype``, ``device_map``, ``revision``, entries of the
            configuration such as ``id2label`` or ``output_hidden_states``, ... Scales stay float32 whatever ``dtype``
            says. With ``ignore_mismatched_sizes`` a layer of another size, such as a head for other ``num_labels``, is
            made afresh: deterministic and trainable, as one in `to_bayesian`'s ``modules_to_save``.

    Returns:
        The model, of its original class, in `eval()` mode; with ``output_loading_info`` a pair of it and transformers'
        dictionary of what was loaded.

    Raises:
        TypeError: ``directory`` is no folder's or model's name.
        ValueError: an argument under which the posterior would not come back whole (``quantization_config``, a
            ``device_map`` that offloads); the checkpoint is neither of a converted model nor has a Laplace posterior;
            it lacks a tensor, holds one that its record does not know, or one that is not what was saved; or its
            posterior was fitted to other weights.
    """
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise TypeError(f"`directory` must be a folder or a name on the hub, got {_short(directory)}.")
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    files = Files(directory, {key: hub[key] for key in _FOLDER if key in hub}, kwargs.get("variant"))
    if is_adapter(files):
        adapted = load_adapter(files, architecture, hub, kwargs)
        take_up_policy(adapted, files.find(POLICY_FILE))
        return adapted  # type: ignore[no-any-return]
    check_arguments(kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    config, kwargs = _configuration(directory, kwargs, hub)
    recorded, head = getattr(config, "bayesian", None), recorded_head(config)
    if head is not None:
        model, info = _with_head(files, config, head, hub, kwargs)
    elif recorded is None:
        model, info = _with_posterior(files, config, hub, kwargs)
    else:
        record = _record(recorded, str(directory))
        files.check(has_posterior=True)
        model, info = _converted(directory, config, record, hub, kwargs)
        check_values(model, str(directory), is_verified=files.are_verified)
    take_up_policy(model, files.find(POLICY_FILE))
    return (model, info) if wants_info else model  # type: ignore[return-value]


def _configuration(
    directory: str | os.PathLike[str], kwargs: dict[str, Any], hub: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the configuration, changed by arguments that it has, and the others, as transformers' Auto classes do.

    A configuration that is given takes the folder's record of the conversion and its class, if it has none itself.
    """
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        own = AutoConfig.from_pretrained(directory, **hub)
        given = copy.deepcopy(given)
        for name in ("bayesian", "architectures"):
            if getattr(given, name, None) is None and getattr(own, name, None) is not None:
                setattr(given, name, getattr(own, name))
        return given, kwargs
    dtypes = {key: kwargs[key] for key in _DTYPES if kwargs.get(key) is not None}
    options = {key: value for key, value in kwargs.items() if not (key in _DTYPES and value == "auto")}
    config, rest = AutoConfig.from_pretrained(
        directory if given is None else given, return_unused_kwargs=True, **options
    )
    return config, {**rest, **hub, **dtypes}


def _record(recorded: Any, directory: str) -> BayesianConfig:
    """Raise ValueError for a record that names no layer: nothing of the posterior would come back."""
    if not isinstance(recorded, Mapping) or not recorded.get("modules") or not isinstance(recorded["modules"], Mapping):
        raise ValueError(
            f"The configuration in {directory!r} has a 'bayesian' entry that names no layer ({_short(recorded)}): it "
            "is damaged. Restore the `config.json` that was saved with these weights."
        )
    return BayesianConfig.from_dict(recorded)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _with_posterior(
    files: Files, config: Any, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A plain model with the Laplace posterior that lies beside it."""
    directory = files.directory
    found = {name: path for name in saved_kinds() if (path := files.find(name)) is not None}
    if not found:
        raise ValueError(
            f"`directory` {directory!r} holds no Bayesian model: its config has no 'bayesian' entry, and there is "
            f"no {FILE} or other file of a posterior. {files.scales_without_record()}Load it with transformers, and "
            "call `to_bayesian`, or fit a posterior with `BayesianTrainer.fit_laplace`. (An INT8 posterior is loaded "
            "by `bayeformers.quantization.load`.)"
        )
    model, info = _plain(files, config, architecture(config, directory, hub), kwargs)
    name, path = next(iter(found.items()))
    model.__dict__[_OWN] = saved_kinds()[name].load(path, model)
    return model, info


def _with_head(
    files: Files, config: Any, head: HeadConfig, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with a VBLL or SNGP head, and with the posterior that lies beside it, if there is one."""
    original = architecture(config, files.directory, hub)
    model, info = _plain(files, config, building(original, head), kwargs, is_whole=_check_head)
    settle(model, original)
    found = next(((kind, path) for name, kind in saved_kinds().items() if (path := files.find(name)) is not None), None)
    if found is not None:
        model.__dict__[_OWN] = found[0].load(found[1], model)
    return model, info


def _check_head(info: Mapping[str, Any], directory: str) -> None:
    """Raise ValueError where a head of another size was asked for: its tensors were never written."""
    if info["mismatched_keys"]:
        names = sorted(key for key, *_ in info["mismatched_keys"])
        raise ValueError(
            f"The checkpoint in {directory!r} has a VBLL or SNGP head, and {names[:3]} ({len(names)}) are of "
            "another size: a fresh head has no posterior. Load it as it is, or with transformers, and make a new head."
        )


def _plain(
    files: Files,
    config: Any,
    loader: type[PreTrainedModel],
    kwargs: dict[str, Any],
    is_whole: Callable[[Mapping[str, Any], str], None] = lambda *_: None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model without Bayesian layers, all of it; ``is_whole`` may refuse what was loaded, before values are read."""
    files.check(has_posterior=False)
    model, info = _load(files.directory, config, loader, kwargs)
    if info["missing_keys"]:
        raise ValueError(told_missing(model, files.directory, info["missing_keys"]))
    is_whole(info, files.directory)
    check_values(model, files.directory, is_verified=True)
    return model, info


def _converted(
    directory: str | os.PathLike[str],
    config: Any,
    recorded: BayesianConfig,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    original = architecture(config, directory, hub)
    model, info = _load(directory, config, _converting(original, recorded), kwargs)
    ties = settle_ties(model)
    if ties != bayesian_config(model).ties:  # the configuration spoke of ties, or of none, where the file has others
        model, info = _load(directory, config, _converting(original, replace(recorded, ties=ties)), kwargs)
        settle_ties(model)
    missing = {key for key in info["missing_keys"] if not _may_lack(model, key)}
    if missing:
        raise ValueError(told_missing(model, str(directory), missing))
    unknown = sorted(filter(posterior_like, info["unexpected_keys"]))
    if unknown:
        raise ValueError(
            f"The checkpoint in {str(directory)!r} holds {len(unknown)} tensors of a posterior that its configuration "
            f"does not record, such as {unknown[:3]}: weights and `config.json` are not of one model."
        )
    model.__class__ = of_source(type(model), original)  # type: ignore[assignment]
    become_fresh(model, {key for key, *_ in info["mismatched_keys"]})
    freeze_as_saved(model, set(info["missing_keys"]))
    return model, info


def _load(
    directory: str | os.PathLike[str], config: Any, loader: type[PreTrainedModel], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = loader.from_pretrained(directory, config=config, output_loading_info=True, **kwargs)
    return loaded[0], loaded[1]


def _may_lack(model: nn.Module, key: str) -> bool:
    """Whether a checkpoint may lack this entry: a prior's centre, unless the prior's scale is stored too."""
    module, _, name = key.rpartition(".")
    if not name.endswith("_prior_centre"):
        return False
    layer = model.get_submodule(module)
    return not (isinstance(layer, BayesianModule) and layer.prior_scale(name.removesuffix("_prior_centre")) is not None)


def _converting(original: type[PreTrainedModel], recorded: BayesianConfig) -> type[PreTrainedModel]:
    """A transient subclass whose `__init__` converts, so that meta devices, shards and ties are transformers' work."""

    class Converting(original):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            convert(self, recorded)
            endings = "_rho", *WIDE_BUFFERS
            scales = {f"{tensor.parameter_name}{end}" for tensor in variational_tensors(self) for end in endings}
            kept = getattr(self, "_keep_in_fp32_modules_strict", None) or ()
            self._keep_in_fp32_modules_strict = {*kept, *scales}

    Converting.__name__, Converting.__qualname__ = original.__name__, original.__qualname__
    Converting.__module__ = original.__module__
    return Converting


def architecture(config: Any, directory: str | os.PathLike[str], hub: dict[str, Any]) -> type[PreTrainedModel]:
    """Return the class that a configuration names: of transformers, of an Auto class's table, or the checkpoint's.

    Args:
        config: the checkpoint's, of transformers.
        directory: the checkpoint's folder or its name on the hub, where code of its own is looked for.
        hub: arguments of the download, of which ``trust_remote_code`` allows such code to run.

    Raises:
        ValueError: there is none.
    """
    name = (config.architectures or [None])[0]
    if name is not None and hasattr(transformers, name):
        known: type[PreTrainedModel] = getattr(transformers, name)
        return known
    registered = _registered(type(config), name)
    if registered is not None:
        return registered
    remote = [ref for ref in getattr(config, "auto_map", {}).values() if str(ref).endswith(f".{name}")]
    if remote and hub.get("trust_remote_code"):
        loaded: type[PreTrainedModel] = get_class_from_dynamic_module(remote[0], str(Path(directory)))
        return loaded
    raise ValueError(
        f"`config.architectures` names {name!r}, which transformers does not have"
        + (": pass `trust_remote_code=True` to run the code that came with it." if remote else ".")
    )


def _registered(config_class: type[Any], name: str | None) -> type[PreTrainedModel] | None:
    """A class of another library, or the user's, that was registered with one of transformers' Auto classes."""
    for auto in vars(modeling_auto).values():
        table = getattr(auto, "_model_mapping", None)
        found = table[config_class] if table is not None and config_class in table else ()
        for model_class in found if isinstance(found, tuple) else (found,):
            if model_class.__name__ == name:
                return cast(type[PreTrainedModel], model_class)
    return None


def become_fresh(model: nn.Module, mismatched: set[str]) -> None:
    """Make the layers that own tensors of ``mismatched`` deterministic and trainable, and record them so.

    A fresh weight has no posterior: the scale delta |weight| of `to_bayesian` says how well training knows a weight,
    and a frozen random head could learn nothing. So it is what ``modules_to_save`` says of a fresh head.

    Raises:
        ValueError: a scale alone has another size than its weight.
    """
    if not mismatched:
        return
    sizes = {name: model.get_parameter(name) for name in mismatched if _is_parameter(model, name)}
    means = {id(parameter) for name, parameter in sizes.items() if not name.endswith("_rho")}
    layers = bayesian_modules(model)
    fresh = {
        name: layer
        for name, layer in layers.items()
        if any(id(layer.get_parameter(key)) in means for key in layer.specs)
    }
    alone = sorted(name for name in mismatched if name.endswith("_rho") and name.rpartition(".")[0] not in fresh)
    if alone:
        raise ValueError(f"The checkpoint has scales of another size than their weights: {alone[:3]} ({len(alone)}).")
    for layer in fresh.values():
        _start(layer)
    if fresh:
        config = bayesian_config(model)
        update_config(
            model,
            modules={name: kind for name, kind in config.modules.items() if name not in fresh},
            modules_to_save=[*config.modules_to_save, *fresh],
        )
        logger.warning(
            "%s (%d) have another size in the checkpoint: they start afresh, deterministic and trainable, without a "
            "posterior. Train them; `to_deterministic(model)` and `to_bayesian` then make them Bayesian.",
            sorted(fresh)[:3],
            len(fresh),
        )


def _start(layer: BayesianModule) -> None:
    kind = type(layer).torch_class
    names = list(layer.specs)
    layer.become_deterministic()
    swap_class(layer, kind)
    for name in names:
        layer.get_parameter(name).requires_grad_(True)


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, key = name.rpartition(".")
    return key in model.get_submodule(module)._parameters
