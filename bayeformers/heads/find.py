"""The head of a model: the one that `to_vbll` or `to_sngp` made, or the linear layer that they replace."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..likelihoods import Likelihood, unwrapped
from .base import Head

__all__ = ["check_likelihood", "find_head", "find_linear", "head_of"]

PROBLEMS = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
)
"""Of the heads that can be replaced."""

RECORD = "bayesian_head"
"""The entry of a configuration, and of its `config.json`."""


def find_head(model: nn.Module) -> Head | None:
    """Look for the head of a model, inside wrappers and PEFT's `modules_to_save` too.

    Returns:
        The head; None of a model without.

    Raises:
        ValueError: there are several.
    """
    found = [module for name, module in model.named_modules() if isinstance(module, Head) and _is_active(model, name)]
    if len(found) > 1:
        raise ValueError(f"`model` ({type(model).__name__}) must have one head, got {len(found)}.")
    return found[0] if found else None


def head_of(model: nn.Module) -> Head:
    """Find the head of a model that has one.

    Returns:
        The head, by which the logits are Gaussian.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    head = find_head(model)
    if head is None:
        raise ValueError(f"`model` ({type(model).__name__}) has no VBLL or SNGP head: call `to_vbll` or `to_sngp`.")
    return head


def _is_active(model: nn.Module, name: str) -> bool:
    """PEFT keeps the original of a module that it saves, and one copy per adapter."""
    parts = name.split(".")
    if "original_module" in parts:
        return False
    if "modules_to_save" not in parts:
        return True
    at = parts.index("modules_to_save")
    wrapper: Any = model.get_submodule(".".join(parts[:at]))
    active = getattr(wrapper, "active_adapters", None) or [getattr(wrapper, "active_adapter", "default")]
    return parts[at + 1] in active


def find_linear(model: nn.Module, name: str | None) -> str:
    """Return the name of the linear layer that is the model's head.

    Args:
        model: of transformers.
        name: of the layer; None: the only one outside of the encoder with `config.num_labels` outputs.

    Raises:
        TypeError: ``name`` is no string, or its layer no `nn.Linear`.
        ValueError: there is no such layer, or there are several.
    """
    modules, num_labels = dict(model.named_modules()), unwrapped(model).config.num_labels  # type: ignore[union-attr]
    if name is not None:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"`head` must be the name of a layer, such as 'classifier', got {name!r}.")
        if type(modules[name]) is not nn.Linear:
            raise TypeError(f"`head` must be an nn.Linear, got {name!r}, a {type(modules[name]).__name__}.")
        if modules[name].out_features != num_labels:
            raise ValueError(
                f"`head` {name!r} has {modules[name].out_features} outputs, for `num_labels`={num_labels}."
            )
        return name
    base = f"{getattr(model, 'base_model_prefix', '')}."
    found = [
        name
        for name, module in modules.items()
        if type(module) is nn.Linear and module.out_features == num_labels and not name.startswith(base)
    ]
    if len(found) != 1:
        raise ValueError(
            f"`head` must name the linear layer with the {num_labels} outputs of this {type(model).__name__}: "
            f"outside of its encoder there are {found or 'none'}."
        )
    return str(found[0])


def check_likelihood(head: Head, likelihood: Likelihood) -> None:
    """Raise ValueError where a head was made for values and its model's problem type says classes, or vice versa."""
    if likelihood.problem_type not in PROBLEMS or likelihood.has_noise != head.is_regression:
        made = "a regression" if head.is_regression else "classes"
        raise ValueError(f"`problem_type` is {likelihood.problem_type!r}, but this head was made for {made}.")
