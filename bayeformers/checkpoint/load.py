"""`bayeformers.from_pretrained`: a converted model, by the stock loader around a class that converts as it is built, or
a trained model with its Laplace posterior. What was saved is accounted for, tensor by tensor (see `accounting`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..conversion.config import BayesianConfig
from ..conversion.convert import bayesian_config, convert, freeze_as_saved, settle_ties
from ..laplace import InfPosterior, LaplacePosterior
from ..laplace.posterior import FILE
from ..laplace.sparse.inf_posterior import FILE as INF_FILE
from ..nn.base import WIDE_BUFFERS, BayesianModule, variational_tensors
from ..nn.parameters import of_source
from .accounting import Files, check_arguments, check_values, posterior_like, told_missing
from .architectures import architecture
from .fresh import become_fresh

_OWN = "posterior"
_DTYPES = ("dtype", "torch_dtype")
_FOLDER = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_HUB_ARGUMENTS = (*_FOLDER, "trust_remote_code")
_POSTERIORS: dict[str, type[LaplacePosterior] | type[InfPosterior]] = {FILE: LaplacePosterior, INF_FILE: InfPosterior}


def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a Bayesian model as it was saved.

    A converted model comes back with its Bayesian layers, scales, priors, ties and frozen means. A model that was saved
    with a Laplace posterior comes back as it was trained, and has the posterior as its attribute ``posterior``, which
    `bayeformers.predict` and `BayesianTrainer` use.

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
    check_arguments(kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    files = Files(directory, {key: hub[key] for key in _FOLDER if key in hub}, kwargs.get("variant"))
    config, kwargs = _configuration(directory, kwargs, hub)
    recorded = getattr(config, "bayesian", None)
    if recorded is None:
        model, info = _with_posterior(files, config, hub, kwargs)
    else:
        record = _record(recorded, str(directory))
        files.check(has_posterior=True)
        model, info = _converted(directory, config, record, hub, kwargs)
        check_values(model, str(directory), is_verified=files.are_verified)
    return (model, info) if wants_info else model  # type: ignore[return-value]


def _configuration(
    directory: str | os.PathLike[str], kwargs: dict[str, Any], hub: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """As in transformers' Auto classes: the configuration, changed by arguments that it has, and the others.

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
    """Errors: ValueError for a record that names no layer: nothing of the posterior would come back."""
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
    found = {name: path for name in _POSTERIORS if (path := files.find(name)) is not None}
    if not found:
        raise ValueError(
            f"`directory` {directory!r} holds no Bayesian model: its config has no 'bayesian' entry, and there is "
            f"no {FILE}. {files.scales_without_record()}Load it with transformers, and call `to_bayesian`, or fit a "
            "posterior with `BayesianTrainer.fit_laplace`. (An INT8 posterior is loaded by "
            "`bayeformers.quantization.load`.)"
        )
    files.check(has_posterior=False)
    model, info = _load(directory, config, architecture(config, directory, hub), kwargs)
    if info["missing_keys"]:
        raise ValueError(told_missing(model, directory, info["missing_keys"]))
    check_values(model, directory, is_verified=True)
    name, path = next(iter(found.items()))
    model.__dict__[_OWN] = _POSTERIORS[name].load(path, model)
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
