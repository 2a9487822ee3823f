"""What the optimizer must know of a Bayesian model: rho has its own step size and clipping, and no weight decay."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import variational_tensors
from .evaluation import MonteCarloTrainer

__all__ = ["ScalesApart", "clip_separately", "holds_some", "kl_regularised_names", "rho_parameters", "separate_rho"]


class ScalesApart(MonteCarloTrainer):
    """A trainer whose optimizer steps, decays and clips the scales of a Bayesian model apart from its means."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Stock names less rho and the means of Bayesian layers, which the KL already pulls to their prior."""
        managed = kl_regularised_names(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in managed]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The stock optimizer with rho in a group of its own at `rho_learning_rate`; one that was passed in is kept."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rhos = rho_parameters(self.model)
        if is_new:
            separate_rho(optimizer, rhos, self.args.rho_learning_rate)
        elif not holds_some(optimizer, rhos):
            self._say("The optimizer that was passed in holds no scale of the model: make it after `to_bayesian`.")
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        rhos = {id(rho): rho for rho in rho_parameters(self.model)}
        if not rhos:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        rest = [parameter for parameter in model.parameters() if id(parameter) not in rhos]
        norm = self.accelerator.clip_grad_norm_(rest, self.args.max_grad_norm)  # also unscales fp16, rho's included
        return clip_separately(rhos.values(), norm, self.args.max_grad_norm)


def rho_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every distinct rho of ``model``, in the order of its layers; empty for an unconverted model."""
    return [tensor.rho for tensor in variational_tensors(model)]


def holds_some(optimizer: torch.optim.Optimizer, rhos: Iterable[nn.Parameter]) -> bool:
    """Whether the optimizer moves any of them, if there are any: one that was made before the conversion moves none."""
    wanted = {id(rho) for rho in rhos}
    return not wanted or any(
        id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"]
    )


def kl_regularised_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: rho, and the means that the KL already pulls."""
    managed = {id(parameter) for tensor in variational_tensors(model) for parameter in (tensor.loc, tensor.rho)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in managed}


def separate_rho(optimizer: torch.optim.Optimizer, rhos: Iterable[nn.Parameter], learning_rate: float) -> None:
    """Give the trainable ``rhos`` of a fresh optimizer a step size of their own, without weight decay.

    In a group of their own; a layer-wise optimizer has one optimizer per Parameter, whose groups are changed. Groups
    that become empty are dropped, so with frozen means the logged learning rate is that of rho.

    Errors: ValueError for an optimizer that takes no such group.
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
    """Clip the gradient of ``rhos`` by its own norm; returns the norm of all, sqrt(rest_norm^2 + rho_norm^2).

    The KL's gradient grows with the number of weights: clipped jointly, it would shrink the steps of the means.
    """
    rho_norm = torch.nn.utils.clip_grad_norm_(list(rhos), max_norm)
    norms = torch.stack([torch.as_tensor(rest_norm).to(rho_norm), rho_norm])
    return norms.square().sum().sqrt()
