"""The class of a saved model, by the name that its configuration records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto


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
