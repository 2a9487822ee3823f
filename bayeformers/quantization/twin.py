"""A deterministic copy of a model that shares its float weights until they are replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..conversion.convert import is_bayesian, to_deterministic
from ..nn.draws import bayesian_modules


def twin(model: nn.Module) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A copy at the posterior mean, without gradients, whose Parameters share the memory of the model's; and which of
    its Parameters stands for which of the model's.

    `own` ends the sharing. Buffers are copies; a posterior that the model carries is left out.
    """
    twins = {parameter: nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()}
    memo: dict[int, Any] = {id(parameter): shared for parameter, shared in twins.items()}
    for layer in bayesian_modules(model).values():
        memo |= {id(buffer): buffer for buffer in layer.buffers(recurse=False)}  # the prior's: dropped at once
    carried = vars(model).get("posterior")
    if carried is not None:
        memo[id(carried)] = None
    copied = copy.deepcopy(model, memo)
    vars(copied).pop("posterior", None)
    if is_bayesian(copied):
        to_deterministic(copied)
    return copied.requires_grad_(False), twins


def own(model: nn.Module, shared: Iterable[nn.Parameter]) -> None:
    """Give the model memory of its own for those of the ``shared`` Parameters that it still has.

    In the Parameter itself: a recurrent layer keeps a second list of its Parameters.
    """
    known = set(shared)
    for parameter in model.parameters():
        if parameter in known:
            parameter.data = parameter.detach().clone()
