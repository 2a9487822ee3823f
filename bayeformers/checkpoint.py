"""`bayeformers.from_pretrained`: a converted model, by the stock loader around a class that converts as it is built, or
a trained model with its Laplace posterior."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file

from .config import BayesianConfig
from .conversion import bayesian_config, convert, freeze_as_saved, settle_ties
from .laplace import LaplacePosterior
from .laplace.posterior import FILE
from .nn.base import WIDE_BUFFERS, BayesianModule, variational_tensors
from .nn.parameters import of_source

_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code",
)  # fmt: skip


def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a Bayesian model as it was saved.

    A converted model comes back with its Bayesian layers, scales, priors, ties and frozen means. A model that was saved
    with a Laplace posterior comes back as it was trained, and has the posterior as its attribute ``posterior``, which
    `bayeformers.predict` and `BayesianTrainer` use.

    Args:
        directory: a folder written by `trainer.save_model` (or by `model.save_pretrained` and `posterior.save`), or a
            hub name.
        kwargs: as for transformers' `from_pretrained` (``dtype``, ``device_map``, ``revision``, ...). Scales stay
            float32 whatever ``dtype`` says.

    Returns:
        The model, of its original class, in `eval()` mode.

    Raises:
        ValueError: the checkpoint is neither of a converted model nor has a Laplace posterior; it lacks scales that its
            configuration promises; or its posterior was fitted to other weights.
    """
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(directory, **hub)
    kwargs.pop("output_loading_info", None)
    recorded = getattr(config, "bayesian", None)
    if recorded is not None:
        return _converted(directory, config, BayesianConfig.from_dict(recorded), hub, kwargs)
    posterior_file = _posterior_file(directory, hub)
    if posterior_file is None:
        raise ValueError(
            f"`directory` {str(directory)!r} holds no Bayesian model: its config has no 'bayesian' entry, and there is "
            f"no {FILE}. Load it with transformers, and call `to_bayesian`, or fit a posterior with "
            "`BayesianTrainer.fit_laplace`. (An INT8 posterior is loaded by `bayeformers.quantization.load`.)"
        )
    model: Any = architecture(config, directory, hub).from_pretrained(directory, config=config, **kwargs)
    model.posterior = LaplacePosterior.load(posterior_file, model)
    return model  # type: ignore[no-any-return]


def _converted(
    directory: str | os.PathLike[str],
    config: Any,
    recorded: BayesianConfig,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    original = architecture(config, directory, hub)
    model, info = _load(directory, config, _converting(original, recorded), kwargs)
    ties = settle_ties(model)
    if ties != bayesian_config(model).ties:  # the configuration spoke of ties, or of none, where the file has others
        model, info = _load(directory, config, _converting(original, replace(recorded, ties=ties)), kwargs)
        settle_ties(model)
    missing = sorted(key for key in info["missing_keys"] if _is_of_posterior(model, key))
    if missing:
        raise ValueError(
            f"The checkpoint in {str(directory)!r} lacks {len(missing)} tensors of its posterior, such as "
            f"{missing[:3]}. It was probably saved again from a plainly loaded model, which holds the mean only; "
            "load that mean with transformers' `from_pretrained`."
        )
    model.__class__ = of_source(type(model), original)  # type: ignore[assignment]
    freeze_as_saved(model, set(info["missing_keys"]))
    return model


def _load(
    directory: str | os.PathLike[str], config: Any, loader: type[PreTrainedModel], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    loaded: Any = loader.from_pretrained(directory, config=config, output_loading_info=True, **kwargs)
    return loaded[0], loaded[1]


def _is_of_posterior(model: nn.Module, key: str) -> bool:
    """Whether a checkpoint must hold this entry; a prior's centre may be missing, unless its scale is stored too."""
    module, _, name = key.rpartition(".")
    if name.endswith("_prior_centre"):
        name = name.removesuffix("_prior_centre")
        layer = model.get_submodule(module)
        return isinstance(layer, BayesianModule) and layer.prior_scale(name) is not None
    return name.endswith(("_rho", *WIDE_BUFFERS))


def _posterior_file(directory: str | os.PathLike[str], hub: dict[str, Any]) -> str | None:
    """In a folder or on the hub; None if there is none."""
    kwargs = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    quiet = {f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors")}
    found: str | None = cached_file(str(directory), FILE, **quiet, **kwargs)
    return found


def architecture(config: Any, directory: str | os.PathLike[str], hub: dict[str, Any]) -> type[PreTrainedModel]:
    """The class that a configuration names: of transformers, of an Auto class's table, or of the checkpoint's own code.

    Errors: ValueError if there is none.
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
