"""`bayeformers.from_pretrained`: the stock loader of transformers around a class that converts as it is built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .config import BayesianConfig
from .conversion import convert, freeze_as_saved

_HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code",
)  # fmt: skip


def from_pretrained(directory: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a converted model as it was saved: class, Bayesian layers, scales, priors, ties, frozen means.

    Args:
        directory: a folder written by `model.save_pretrained` or `trainer.save_model`, or a hub name.
        kwargs: as for transformers' `from_pretrained` (``dtype``, ``device_map``, ``revision``, ...). Scales stay
            float32 whatever ``dtype`` says.

    Returns:
        The model, of its original class, in `eval()` mode.

    Raises:
        ValueError: the checkpoint is not of a converted model, or lacks scales that its configuration promises.
    """
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(directory, **hub)
    recorded = getattr(config, "bayesian", None)
    if recorded is None:
        raise ValueError(
            f"`directory` {str(directory)!r} holds no Bayesian model (its config has no 'bayesian' entry). "
            "Load it with transformers and call `to_bayesian`."
        )
    original = _architecture(config, directory, hub)
    loader = _converting(original, BayesianConfig.from_dict(recorded))
    kwargs.pop("output_loading_info", None)
    model: PreTrainedModel
    info: dict[str, Any]
    model, info = loader.from_pretrained(directory, config=config, output_loading_info=True, **kwargs)  # type: ignore[misc]
    missing = sorted(key for key in info["missing_keys"] if key.endswith("_rho"))
    if missing:
        raise ValueError(
            f"The checkpoint in {str(directory)!r} lacks {len(missing)} tensors of its posterior, such as "
            f"{missing[:3]}. It was probably saved again from a plainly loaded model, which holds the mean only; "
            "load that mean with transformers' `from_pretrained`."
        )
    model.__class__ = original
    freeze_as_saved(model, set(info["missing_keys"]))
    return model


def _architecture(config: Any, directory: str | os.PathLike[str], hub: dict[str, Any]) -> type[PreTrainedModel]:
    name = (config.architectures or [None])[0]
    if name is not None and hasattr(transformers, name):
        known: type[PreTrainedModel] = getattr(transformers, name)
        return known
    remote = [ref for ref in getattr(config, "auto_map", {}).values() if str(ref).endswith(f".{name}")]
    if remote and hub.get("trust_remote_code"):
        loaded: type[PreTrainedModel] = get_class_from_dynamic_module(remote[0], str(Path(directory)))
        return loaded
    raise ValueError(
        f"`config.architectures` names {name!r}, which transformers does not have"
        + (": pass `trust_remote_code=True` to run the code that came with it." if remote else ".")
    )


def _converting(original: type[PreTrainedModel], recorded: BayesianConfig) -> type[PreTrainedModel]:
    """A transient subclass whose `__init__` converts, so that meta devices, shards and ties are transformers' work."""

    class Converting(original):  # type: ignore[valid-type, misc]
        _keep_in_fp32_modules_strict = set(getattr(original, "_keep_in_fp32_modules_strict", None) or ()) | {
            "weight_rho",
            "bias_rho",
        }

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            convert(self, recorded)

    Converting.__name__, Converting.__qualname__ = original.__name__, original.__qualname__
    Converting.__module__ = original.__module__
    return Converting
