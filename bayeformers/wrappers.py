"""Modules around a transformers model whose own way of saving knows nothing of a conversion."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_SAVING = ("save_pretrained", "save", "push_to_hub")


def told_of_own_save(model: nn.Module) -> str | None:
    """What to say after ``model`` was converted as a whole, if what it saves would be loaded without its posterior.

    A model of transformers, and one that is saved by its `state_dict`, have no such trouble: None.
    """
    if isinstance(model, PreTrainedModel):
        return None
    how = [name for name in _SAVING if callable(getattr(model, name, None))]
    if not how:
        return None
    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        return (
            f"{kind}: the adapter's folder will hold the scales of its Bayesian layers, and `from_pretrained` of PEFT "
            "reads the means alone. To load all: load the adapter, call `to_bayesian` as here, then "
            "`peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder))`."
        )
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
