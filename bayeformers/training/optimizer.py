"""What the optimizer must know of a Bayesian model: rho has its own step size and clipping, and no weight decay."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.find import find_head
from ..nn.base import variational_tensors
from ..processes.dtensors import whole

__all__ = ["clip_separately", "holds_some", "kl_regularised_names", "rho_parameters", "separate_rho"]


def rho_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every distinct rho of ``model``, in the order of its layers, or the scales of its VBLL or SNGP head."""
    head = find_head(model)
    return [tensor.rho for tensor in variational_tensors(model)] if head is None else head.scale_parameters()


def holds_some(optimizer: torch.optim.Optimizer, rhos: Iterable[nn.Parameter]) -> bool:
    """Whether the optimizer moves any of them, if there are any: one that was made before the conversion moves none."""
    wanted = {id(rho) for rho in rhos}
    return not wanted or any(
        id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"]
    )


def kl_regularised_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: those that the KL, or a head's penalty, pulls."""
    managed = {id(parameter) for tensor in variational_tensors(model) for parameter in (tensor.loc, tensor.rho)}
    if (head := find_head(model)) is not None:
        managed |= {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in managed}


def separate_rho(optimizer: torch.optim.Optimizer, rhos: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Give the trainable ``rhos`` of a fresh optimizer a step size of their own, without weight decay.

    In a group of their own; a layer-wise optimizer has one optimizer per Parameter, whose groups are changed. Groups
    that become empty are dropped, so with frozen means the logged learning rate is that of rho.

    Args:
        optimizer: the optimizer; one that takes no such group is a ValueError.
        rhos: of the model.
        learning_rate: their step size.
    """
    trainable = {id(rho): rho for rho in rhos if rho.requires_grad}
    own: dict[str, Any] = {"lr": learning_rate, "weight_decay": 0.0}
    if "relative_step" in optimizer.defaults:  # Adafactor would choose its steps itself
        own |= {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    single = getattr(optimizer, "optimizer_dict", None)
    if isinstance(single, dict):
        for rho in trainable.values():
            for group in single[rho].param_groups if rho in single else ():
                group.update(own)
        groups = [group for part in single.values() for group in part.param_groups]
    else:
        _move(optimizer, trainable, own)
        groups = optimizer.param_groups
    _check_separate(optimizer, groups, trainable, learning_rate)


def _move(optimizer: torch.optim.Optimizer, moved: dict[int, nn.Parameter], own: dict[str, Any]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held & set(moved):
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.add_param_group({"params": [rho for key, rho in moved.items() if key in held], **own})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _check_separate(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], rhos: dict[int, nn.Parameter], learning_rate: float
) -> None:
    rates = [(id(parameter), float(group["lr"] or 0.0)) for group in groups for parameter in group["params"]]
    found = [(key, rate) for key, rate in rates if key in rhos]
    right = all(math.isclose(rate, learning_rate, rel_tol=1e-6) for _, rate in found)  # some keep it in float32
    if not right or sorted(key for key, _ in found) != sorted(rhos):
        raise ValueError(
            f"`optim`: {type(optimizer).__name__} takes no group of its own for the scales, whose step size is "
            f"`rho_learning_rate`={learning_rate}. Use an optimizer with parameter groups, such as "
            '`optim="adamw_torch"`, or pass `optimizers=(yours, None)` with groups as you want them.'
        )


def clip_separately(rhos: Iterable[nn.Parameter], rest_norm: Tensor, max_norm: float) -> Tensor:
    """Return the norm of all gradients, sqrt(rest_norm^2 + rho_norm^2), after clipping ``rhos`` by their own.

    The KL's gradient grows with the number of weights: clipped jointly, it would shrink the steps of the means.

    Args:
        rhos: the parameters of the scales.
        rest_norm: the norm of all other gradients, which are clipped by now.
        max_norm: of the gradient of ``rhos``.
    """
    rho_norm = whole(torch.nn.utils.clip_grad_norm_(list(rhos), max_norm))
    norms = torch.stack([whole(torch.as_tensor(rest_norm)).to(rho_norm), rho_norm])
    return norms.square().sum().sqrt()
