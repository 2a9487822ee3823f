"""Modules around a transformers model whose own way of saving knows nothing of a conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..nn.base import variational_tensors
from ..nn.draws import posterior_mean

_SAVING = ("save_pretrained", "save", "push_to_hub")
_WHOLE = "Save `model.state_dict()`, and load it into a model with the same adapters after the same `to_bayesian` call."


def told_of_own_save(model: nn.Module) -> str | None:
    """What to say after ``model`` was converted as a whole, if what it saves would be loaded without its posterior.

    A model of transformers, and one that is saved by its `state_dict`, have no such trouble: None. Of adapters see
    `told_of_adapters`.
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return None
    how = [name for name in _SAVING if callable(getattr(model, name, None))]
    if not how:
        return None
    kind = type(model).__name__
    inner = next((name for name, module in model.named_modules() if isinstance(module, PreTrainedModel)), None)
    remedy = "Save its `state_dict()`, and load it into a model after the same `to_bayesian` call."
    if inner is not None:
        remedy = (
            f"Convert the transformers model inside, `model.get_submodule({inner!r})`: what that saves is read by "
            "`bayeformers.from_pretrained`, and can be put in its place."
        )
    return (
        f"{kind} was converted as a whole, but its own `{how[0]}` does not record that: what it saves is loaded "
        f"without the posterior. {remedy}"
    )


def told_of_adapters(model: nn.Module) -> str | None:
    """What to say of a converted model with adapters: a folder of theirs holds no conversion; None: it has none.

    The adapters are PEFT's, or were added by transformers' own `add_adapter`, which saves them alone too.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        kind = type(model).__name__
        return f"{kind}: with adapters, its own `save_pretrained` saves these alone, without the posterior. {_WHOLE}"
    if not hasattr(model, "peft_config"):
        return None
    kind, tensors = type(model).__name__, list(variational_tensors(model))
    try:
        saved = saved_by_peft(model, model.state_dict(keep_vars=True))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # of some kinds before they are trained
        saved = set()
    lost = [tensor.name for tensor in tensors if id(tensor.rho) not in saved]
    if lost:
        return (
            f"{kind}: the adapter's folder holds no scales of {len(lost)} of its {len(tensors)} Bayesian tensors, such "
            f"as {lost[:3]}. {_WHOLE}"
        )
    return (
        f"{kind}: the adapter's folder will hold the scales of its Bayesian layers, and `from_pretrained` of PEFT "
        "reads the means alone. To load all: load the adapter, call `to_bayesian` as here, then "
        "`peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder))`."
    )


def peft_state(model: Any, own: dict[str, Any], adapter: str) -> dict[str, Tensor]:
    """What PEFT saves of an adapter, by the names that it gives them: tensors of ``own``, or computed ones.

    ``own``: ``model.state_dict(keep_vars=True)``, so that a tensor is told by its identity.
    """
    from peft import get_peft_model_state_dict  # an extra

    with torch.no_grad(), posterior_mean(model):
        state = get_peft_model_state_dict(model, own, adapter_name=adapter, save_embedding_layers=False)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def saved_by_peft(model: nn.Module, own: dict[str, Any]) -> set[int]:
    """The ids of the tensors that PEFT saves, of all adapters; see :func:`peft_state`."""
    return {id(t) for adapter in getattr(model, "peft_config", ()) for t in peft_state(model, own, adapter).values()}
