"""Random in `eval()` too, as the older packages were: their programs call the model S times for S draws.

`posterior_mean` and `fixed_draw` decide here as everywhere.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..conversion.record import Conversion, conversion_of, conversion_record
from ..nn import BayesianModule, fixed_draw
from ..nn.draws import bayesian_modules
from ..nn.estimators import REPARAMETERIZATION, Estimator
from ..nn.reading import MEAN


class AlwaysRandom(BayesianModule):
    """Mixin before a Bayesian layer that is built by hand: every call draws, in `train()` and in `eval()`."""

    @property
    def is_random(self) -> bool:
        """Whether the next forward uses noise: always, unless the mean is held."""
        return self.draw is not MEAN

    @property
    def active_estimator(self) -> Estimator:
        """In `eval()` one draw for the whole batch: a prediction is that of a network."""
        return super().active_estimator if self.training else REPARAMETERIZATION


def fresh_seed() -> int:
    """A seed from torch's default generator, so that `torch.manual_seed` repeats what follows."""
    return int(torch.randint(2**62, ()).item())


def draw_in_eval(model: nn.Module) -> None:
    """Every forward of a converted ``model`` in `eval()` is one fresh draw, unless a draw or the mean is held.

    `to_deterministic` ends it.

    >>> from bayeformers import posterior_mean, to_bayesian
    >>> model = to_bayesian(nn.Linear(2, 1)).eval()
    >>> draw_in_eval(model)
    >>> bool(model(torch.ones(1, 2)) == model(torch.ones(1, 2)))
    False
    >>> with posterior_mean(model):
    ...     bool(model(torch.ones(1, 2)) == model(torch.ones(1, 2)))
    True
    """
    hooks = _FreshDraw(model, conversion_of(model))
    # the layers have them too, for programs that call `model.forward` and so pass the model's own by
    for module in {id(m): m for m in (model, *bayesian_modules(model).values())}.values():
        module.register_forward_pre_hook(hooks.begin)
        module.register_forward_hook(hooks.end, always_call=True)


class _FreshDraw:
    """Holds a new draw from the beginning to the end of the forward of a model or, within none, of a layer."""

    def __init__(self, model: nn.Module, conversion: Conversion) -> None:
        self.model, self.conversion = model, conversion  # a later conversion of the model is none of its business
        self.held: list[ExitStack] = []

    def begin(self, module: nn.Module, args: Any) -> None:
        self.held.append(ExitStack())
        is_free = not module.training and all(m.draw is None for m in bayesian_modules(module).values())
        if is_free and conversion_record(self.model) is self.conversion:
            self.held[-1].enter_context(fixed_draw(module, 0, fresh_seed()))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.held:  # torch calls it also where another hook failed before `begin`
            self.held.pop().close()
