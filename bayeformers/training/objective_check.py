"""Whether the loss that is trained is ours: the order of the bases, and what a subclass overrides.

The order is known before anything runs. An override may call ours or not, which only a step can tell: it is looked at
before the optimizer moves anything.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback

from ..nn.base import is_bayesian

__all__ = ["ObjectiveCheck", "OwnObjective", "check_bases", "overriding"]

DECISIVE = (
    "compute_loss",
    "training_step",
    "get_batch_samples",
    "prediction_step",
    "evaluation_loop",
    "create_optimizer",
    "get_decay_parameter_names",
)
"""Methods that decide what is trained and how it is evaluated."""


def check_bases(kind: type, own: type) -> None:
    """Errors: TypeError where another Trainer stands before ``own`` among the bases of ``kind`` and replaces its loss
    or its evaluation.
    """
    for base in _before(kind, own):
        replaced = [name for name in DECISIVE if name in vars(base)]
        if issubclass(base, Trainer) and not issubclass(base, own) and replaced:
            raise TypeError(
                f"`{kind.__name__}` has `{base.__name__}` before `{own.__name__}` among its bases, whose "
                f"{', '.join(f'`{name}`' for name in replaced)} would win: it would train without the KL or evaluate "
                f"without the posterior. Write `class {kind.__name__}({own.__name__}, {base.__name__})`."
            )


def overriding(kind: type, own: type, name: str) -> str | None:
    """`Class.method` of the first class before ``own`` that defines the method ``name``; None if none does."""
    return next((f"{base.__name__}.{name}" for base in _before(kind, own) if name in vars(base)), None)


def _before(kind: type, own: type) -> tuple[type, ...]:
    return kind.__mro__[: kind.__mro__.index(own)]


class OwnObjective:
    """What a Trainer knows of the loss of the present step: whether its own methods have made it.

    Attributes:
        loss_is_ours: whether our `compute_loss` ran, of which the stock step must divide nothing.
    """

    loss_is_ours: bool = False
    _has_batches: bool = False
    _scaled: bool | None = None

    @property
    def loss_is_scaled_for_ga(self) -> bool | None:
        """Our loss is a share of its group's. An override's is a mean of its own, for the stock step to divide."""
        return self.loss_is_ours if self._scaled is None else self._scaled

    @loss_is_scaled_for_ga.setter
    def loss_is_scaled_for_ga(self, value: bool | None) -> None:
        self._scaled = value

    def forget_loss(self, has_batches: bool = False) -> None:
        """A step begins, ``has_batches`` if our `get_batch_samples` has counted its items."""
        self.loss_is_ours, self._has_batches = False, has_batches

    def check_objective(self, own: type) -> None:
        """Errors: ValueError where the step that is about to move the model did not take the loss of ``own``."""
        has_batches, self._has_batches = self._has_batches, False
        if has_batches and self.loss_is_ours:
            return
        names = ("compute_loss", "training_step") if has_batches else ("get_batch_samples",)
        found = (overriding(type(self), own, name) for name in names)
        raise ValueError(
            f"`{next((name for name in found if name), type(self).__name__)}` does not call `super().{names[0]}`: the "
            "loss of this Bayesian model would have no KL and another scale. For a loss of your own (class weights, "
            "...) pass `compute_loss_func(outputs, labels, num_items_in_batch)` to the trainer; for more terms, add "
            "them to what `super().compute_loss(...)` returns."
        )


class HasObjective(Protocol):
    """A trainer whose steps can be checked."""

    model: nn.Module

    def start_anew(self) -> None:
        """Forget a training that has ended."""

    def check_objective(self, own: type) -> None:
        """Raise ValueError where a step did not take the loss of ``own``."""


class ObjectiveCheck(TrainerCallback):
    """Before every optimizer step of a Bayesian model: `BayesianTrainer` has computed its loss, all of it."""

    def __init__(self, trainer: HasObjective, own: type) -> None:
        self.trainer, self.own = trainer, own

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A training begins, or begins anew with smaller batches (`auto_find_batch_size`)."""
        self.trainer.start_anew()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Errors: ValueError naming the override that left our loss out; nothing has moved by then."""
        if is_bayesian(self.trainer.model):
            self.trainer.check_objective(self.own)
