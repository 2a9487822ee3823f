"""The objective of one training: the ELBO of its steps, the terms beside it, and that nothing else is trained.

The order of a trainer's bases is known before anything runs. An override may call ours or not, which only a step can
tell: it is looked at before the optimizer moves anything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from ..heads.find import find_head
from ..likelihoods import NoiseStd
from ..nn.base import is_bayesian
from ..nn.kl import kl_divergence, log_variational_posterior
from .alignment import CalibrationTerm
from .arguments import BayesianTrainingArguments
from .elbo import Group, elbo_loss, kl_warmup
from .items import LabelledBatch, LikelihoodsByLabels
from .own_terms import ForwardPass
from .records import SILENT_LAYERS, HeadRecord, TrainingRecord

__all__ = ["Objective", "ObjectiveCheck", "check_bases", "overriding"]

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
    """Raise TypeError where a Trainer before ``own`` among the bases of ``kind`` replaces its loss or evaluation."""
    for base in _before(kind, own):
        replaced = [name for name in DECISIVE if name in vars(base)]
        if issubclass(base, Trainer) and not issubclass(base, own) and replaced:
            raise TypeError(
                f"`{kind.__name__}` has `{base.__name__}` before `{own.__name__}` among its bases, whose "
                f"{', '.join(f'`{name}`' for name in replaced)} would win: it would train without the KL or evaluate "
                f"without the posterior. Write `class {kind.__name__}({own.__name__}, {base.__name__})`."
            )


def overriding(kind: type, own: type, name: str) -> str | None:
    """Return `Class.method` of the first class before ``own`` that defines a method; None if none does.

    Args:
        kind: the trainer's class.
        own: one of its bases.
        name: of the method.
    """
    return next((f"{base.__name__}.{name}" for base in _before(kind, own) if name in vars(base)), None)


def _before(kind: type, own: type) -> tuple[type, ...]:
    return kind.__mro__[: kind.__mro__.index(own)]


class Objective:
    """What a `BayesianTrainer` minimises, from the first batch of a `train()` to its last.

    Attributes:
        has_begun: whether the first batch has been seen.
        group: the micro-batches of the present optimizer step; None outside of `train()`.
        record: N, and the sums of the next log; None before the first batch, and for a model without a prior.
        calibration: the calibration loss, if there is one.
        has_own_terms: whether the model's own loss has terms besides the likelihood, which are trained along.
        likelihoods: of the head, each resolved once.
        loss_is_ours: whether our `compute_loss` made the present step's loss, of which the stock step divides nothing.
        has_batches: whether our `get_batch_samples` counted its items.
    """

    def __init__(self, args: BayesianTrainingArguments, say: Callable[[str], None]) -> None:
        self.args, self._say = args, say
        self.has_begun, self.has_own_terms = False, False
        self.group: Group | None = None
        self.record: TrainingRecord | HeadRecord | None = None
        self.calibration: CalibrationTerm | None = None
        self.likelihoods = LikelihoodsByLabels()
        self.loss_is_ours, self.has_batches = False, False

    def close(self) -> None:
        """Leave the model: the training is over, or begins anew."""
        if self.record is not None:
            self.record.silent_layers()  # which ends the watch

    def start_step(self, group: Group) -> None:
        """An optimizer step of these micro-batches begins."""
        self.group = group
        if self.record is not None:
            self.record.start_step()

    def check_step(self, kind: type, own: type) -> None:
        """Raise ValueError where the coming step of ``own``, or its subclass ``kind``, did not take our loss."""
        has_batches, self.has_batches = self.has_batches, False
        if has_batches and self.loss_is_ours:
            return
        names = ("compute_loss", "training_step") if has_batches else ("get_batch_samples",)
        found = (overriding(kind, own, name) for name in names)
        raise ValueError(
            f"`{next((name for name in found if name), kind.__name__)}` does not call `super().{names[0]}`: the "
            "loss of this Bayesian model would have no KL and another scale. For a loss of your own (class weights, "
            "...) pass `compute_loss_func(outputs, labels, num_items_in_batch)` to the trainer; for more terms, add "
            "them to what `super().compute_loss(...)` returns."
        )

    def loss(
        self,
        model: nn.Module,
        state: TrainerState,
        passes: list[ForwardPass],
        batch: LabelledBatch,
        noise_std: Callable[[], NoiseStd | None],
    ) -> Tensor:
        """This micro-batch's share of its optimizer step's loss, a scalar with gradient; see `training.elbo`.

        Args:
            model: the model; one that is not Bayesian has no KL, and no terms beside the likelihood, unless it has a
                VBLL or SNGP head, whose penalty takes the KL's place.
            state: the step, for the KL's warm-up.
            passes: one per draw.
            batch: the micro-batch.
            noise_std: a regression's noise, for the calibration loss.

        Returns:
            NLL + KL + calibration loss + own terms.

        Raises:
            ValueError: N is not known.
        """
        args, record, group = self.args, self.record, self.group or Group(batch.num_items, 1)
        nll_sum = torch.stack([forward.nll for forward in passes]).mean()
        head = find_head(model)
        if not is_bayesian(model) and head is None:
            return elbo_loss(nll_sum, group)[0]
        num_items = args.num_training_items if record is None else record.num_items
        if num_items is None:
            raise ValueError("`num_training_items` must be given to compute the ELBO outside `train()`.")
        kl = (kl_divergence(model) if head is None else head.penalty()).to(nll_sum.device)
        weight = args.kl_weight * kl_warmup(state.global_step, state.max_steps, args.kl_warmup_ratio)
        nll, kl_term = elbo_loss(nll_sum, group, weight * kl / num_items)
        # the terms beside it are weighted by the micro-batch's items, as the NLL is
        means = (self._calibrated(passes, batch, noise_std, state.global_step), self._own_terms(passes, batch))
        calibration, own = (0.0 if mean is None else elbo_loss(mean * batch.num_items, group)[0] for mean in means)
        if record is not None:
            with torch.no_grad():
                log_posterior = log_variational_posterior(model) if record.starts_step else 0.0
            record.add(nll, kl / group.num_batches, log_posterior, calibration, own)
            if names := record.silent_layers():
                self._say(SILENT_LAYERS.format(len(names), ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")))
        return nll + kl_term + args.calibration_weight * calibration + own

    def _calibrated(
        self, passes: list[ForwardPass], batch: LabelledBatch, noise_std: Callable[[], NoiseStd | None], step: int
    ) -> Tensor | None:
        if self.calibration is None:
            return None
        noise = noise_std() if batch.likelihood.has_noise else None
        return self.calibration([forward.outputs for forward in passes], batch.inputs, noise, step)

    def _own_terms(self, passes: list[ForwardPass], batch: LabelledBatch) -> Tensor | None:
        if not self.has_own_terms or not batch.num_items:
            return None  # the own loss of no item is a mean over nothing
        return torch.stack([torch.as_tensor(forward.own_terms) for forward in passes]).mean()

    def log(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The ELBO's parts, as means since the last log, and the calibration loss's thresholds."""
        if self.record is None:
            return {}
        parts = self.record.drain(mean_over_ranks)
        absent = {"calibration_loss"} if self.calibration is None else set()
        absent |= set() if self.has_own_terms else {"own_terms"}
        report = {} if self.calibration is None else self.calibration.report()
        return {name: value for name, value in parts.items() if name not in absent} | report

    def save_calibration(self, folder: Path) -> None:
        """Write what the calibration loss has seen beside a checkpoint, for a training that goes on from it."""
        if self.calibration is not None:
            self.calibration.save(folder)


class ObjectiveCheck(TrainerCallback):
    """Before every optimizer step of a Bayesian model: `BayesianTrainer` has computed its loss, all of it."""

    def __init__(self, trainer: Any, own: type) -> None:
        self.trainer, self.own = trainer, own

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew: a training begins, or begins again with smaller batches (`auto_find_batch_size`).

        Args:
            args: of the training.
            state: how far the training is.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given, such as the model.
        """
        self.trainer.start_anew()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step whose loss an override has left ours out of; nothing has moved by then.

        Args:
            args: of the training.
            state: how far the training is.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given, such as the model.
        """
        if is_bayesian(self.trainer.model) or find_head(self.trainer.model) is not None:
            self.trainer._objective.check_step(type(self.trainer), self.own)
