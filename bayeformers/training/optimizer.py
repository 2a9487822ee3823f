"""What the optimizer must know of a Bayesian model: rho has its own step size and clipping, and no weight decay."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..nn.base import variational_tensors

__all__ = ["clip_separately", "kl_regularised_names", "rho_parameters", "separate_rho"]


def rho_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every distinct rho of ``model``, in the order of its layers; empty for an unconverted model."""
    return [tensor.rho for tensor in variational_tensors(model)]


def kl_regularised_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: rho, and the means that the KL already pulls."""
    managed = {id(parameter) for tensor in variational_tensors(model) for parameter in (tensor.loc, tensor.rho)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in managed}


def separate_rho(optimizer: torch.optim.Optimizer, rhos: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Move the trainable ``rhos`` of a fresh optimizer into a group of their own, without weight decay.

    Groups that become empty are dropped, so with frozen means the logged learning rate is that of rho.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    moved = {id(rho): rho for rho in rhos if id(rho) in held}
    if not moved:
        return
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    optimizer.add_param_group({"params": list(moved.values()), "lr": learning_rate, "weight_decay": 0.0})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def clip_separately(rhos: Iterable[nn.Parameter], rest_norm: Tensor, max_norm: float) -> Tensor:
    """Clip the gradient of ``rhos`` by its own norm; returns the norm of all, sqrt(rest_norm^2 + rho_norm^2).

    The KL's gradient grows with the number of weights: clipped jointly, it would shrink the steps of the means.
    """
    rho_norm = torch.nn.utils.clip_grad_norm_(list(rhos), max_norm)
    norms = torch.stack([torch.as_tensor(rest_norm).to(rho_norm), rho_norm])
    return norms.square().sum().sqrt()
