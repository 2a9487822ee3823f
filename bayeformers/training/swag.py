"""`SWAGCallback`: a training's last part at a constant rate, whose weights make a SWAG posterior."""

import math
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checks import check_count, check_number, is_real, is_whole
from ..conversion.convert import is_bayesian
from ..posteriors import RunningMoments, SWAGPosterior
from ..posteriors.moments import trained
from .schedules import lent_model, load_beside, save_beside, set_rate

__all__ = ["SWAGCallback"]

FILE = "swag_moments.safetensors"


class SWAGCallback(TrainerCallback):
    """Takes the weights' moments along a training, for any `Trainer` (Maddox et al. 2019, algorithm 1).

    From ``start`` on the learning rate is ``lr`` at every step, and every ``every`` steps the weights that train are
    taken into the moments, on the CPU in float32. After the training `posterior` gives the SWAG posterior::

        swag = SWAGCallback(start=0.75, every=20, lr=2e-5)
        trainer = BayesianTrainer(model=model, args=args, train_dataset=train, callbacks=[swag])
        trainer.train()
        trainer.posterior = swag.posterior(trainer.model)

    Checkpoints hold the moments, so that a resumed training ends with the same posterior. Each process keeps them.

    Args:
        start: the first step at the constant rate, or a share of all steps, >= 0 and < 1.
        every: steps from one snapshot to the next, >= 1.
        rank: columns of the low-rank part, the last snapshots' deviations: 0, for a diagonal covariance, or >= 2.
        lr: the constant learning rate; None: that which the schedule has at ``start``.
        resume_from: the checkpoint that the training goes on from, where it lies outside of ``args.output_dir``.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        start: int | float = 0.75,
        every: int = 20,
        rank: int = 20,
        lr: float | None = None,
        *,
        resume_from: str | None = None,
    ) -> None:
        is_step = is_whole(start) and start >= 0
        is_share = is_real(start) and not is_whole(start) and 0 <= start < 1
        if not (is_step or is_share):
            raise ValueError(f"`start` must be a step >= 0 or a share of all steps >= 0 and < 1, got {start!r}.")
        check_count("every", every, 1)
        if lr is not None:
            check_number("lr", lr, 0, strict=True)
        self.start, self.every, self.rank, self.lr, self.resume_from = start, every, rank, lr, resume_from
        self.running = RunningMoments(rank)
        self._first, self._rate = 0, lr

    def posterior(self, model: nn.Module, **options: Any) -> SWAGPosterior:
        """Return the posterior around the trained model, which stays as it is.

        Args:
            model: the Trainer's.
            **options: of `SWAGPosterior`.

        Raises:
            ValueError: fewer than two snapshots were taken.
        """
        if self.running.num_snapshots < 2:
            raise ValueError(
                f"`SWAGCallback` has taken {self.running.num_snapshots} snapshots, and needs two at least: start "
                f"earlier than step {self._first}, or take them oftener than every {self.every} steps."
            )
        return SWAGPosterior(model, self.running.moments(), **options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the first step, and take up a checkpoint's moments; ValueError where there can be no posterior."""
        if is_bayesian(lent_model(kwargs)):
            raise ValueError("`SWAGCallback` is for a model with one set of weights, and this one is converted.")
        is_step = is_whole(self.start)
        self._first = int(self.start) if is_step else math.floor(self.start * state.max_steps)
        if self._first + self.every > state.max_steps:
            raise ValueError(
                f"`start`={self.start!r} and `every`={self.every}: no snapshot within the {state.max_steps} steps."
            )
        self.running, self._rate = RunningMoments(self.rank), self.lr
        if state.global_step > self._first:
            tensors, meta = load_beside(FILE, args, state, self.resume_from)
            self.running.restore(tensors, meta["num_snapshots"])
            self._rate = meta["rate"]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The constant rate."""
        if state.global_step >= self._first:
            if self._rate is None:
                self._rate = float(kwargs["optimizer"].param_groups[0]["lr"])
            set_rate(self._rate, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A snapshot, where one is due."""
        done = state.global_step - self._first
        if done > 0:
            assert self._rate is not None  # set when the step began
            set_rate(self._rate, kwargs)  # for the log, which the schedule has written meanwhile
            if done % self.every == 0:
                self.running.add({name: p.detach() for name, p in trained(lent_model(kwargs)).items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The moments go into the checkpoint."""
        meta = {"num_snapshots": self.running.num_snapshots, "rate": self._rate}
        save_beside(FILE, self.running.state(), meta, args, state)
