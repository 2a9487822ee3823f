"""`CyclicalCallback`: cyclical steps, whose ends are snapshots of a chain (Zhang et al. 2020)."""

import math
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import storage
from ..checks import check_count, check_number
from ..conversion.convert import is_bayesian
from ..posteriors import EnsemblePosterior
from ..processes import gathered
from .schedules import check_chain, lent_model, load_beside, save_beside, set_rate, sghmc_in

__all__ = ["CyclicalCallback"]

FILE = "snapshots.safetensors"
_KIND = "ensemble member"


class CyclicalCallback(TrainerCallback):
    r"""Cycles of the learning rate for any `Trainer`, with snapshots that make an `EnsemblePosterior`.

    Step t of a cycle of C steps has the rate lr / 2 (cos(pi t / C) + 1) (Zhang et al. 2020, equation 1). With
    `bayeformers.optim.SGHMC` the share ``exploration`` of each cycle is without noise, and the rest samples at
    ``temperature``; with any other optimizer it is a snapshot ensemble (Huang et al. 2017)::

        optimizer = SGHMC(model.parameters(), lr=0.1, num_data=len(train), prior_precision=1.0, prior_mean="start")
        cycles = CyclicalCallback(num_cycles=4, lr=0.1, samples_per_cycle=3)
        trainer = BayesianTrainer(model=model, args=args, train_dataset=train, callbacks=[cycles],
                                  optimizers=(optimizer, None))
        trainer.train()
        trainer.posterior = cycles.posterior(trainer.model)

    The Trainer's loss is a mean over the items of a step, whatever the accumulation and the number of processes, and
    the noise is a function of the step alone: the chain is the same. Checkpoints hold what a resumed training needs.

    Args:
        num_cycles: of the training, >= 1.
        lr: the largest rate, > 0.
        samples_per_cycle: snapshots in each cycle, spread evenly over its sampling part, the last at its end, >= 1.
        exploration: share of a cycle that is not sampled from, >= 0 and < 1.
        temperature: of SGHMC in the sampling part, > 0.
        directory: where snapshots are written, a file for each; None: they stay in the host's memory.
        resume_from: the checkpoint that the training goes on from, where it lies outside of ``args.output_dir``.

    Raises:
        ValueError: an argument is out of range. At the beginning of a training: a converted model; too few steps; with
            SGHMC clipped gradients or fp16, under which the chain has another target.
    """

    def __init__(
        self,
        num_cycles: int,
        lr: float,
        *,
        samples_per_cycle: int = 1,
        exploration: float = 0.5,
        temperature: float = 1.0,
        directory: str | Path | None = None,
        resume_from: str | None = None,
    ) -> None:
        check_count("num_cycles", num_cycles, 1)
        check_number("lr", lr, 0, strict=True)
        check_count("samples_per_cycle", samples_per_cycle, 1)
        check_number("exploration", exploration, 0)
        if exploration >= 1:
            raise ValueError(f"`exploration` must be a share below 1, got {exploration!r}: nothing would be sampled.")
        check_number("temperature", temperature, 0, strict=True)
        self.num_cycles, self.lr, self.samples_per_cycle = num_cycles, lr, samples_per_cycle
        self.exploration, self.temperature, self.resume_from = exploration, temperature, resume_from
        self.directory = None if directory is None else storage.folder(directory)
        self.steps: list[int] = []
        self._snapshots: list[dict[str, Tensor]] = []
        self._due: frozenset[int] = frozenset()
        self._bounds: list[int] = []

    def posterior(self, model: nn.Module) -> EnsemblePosterior:
        """Return the snapshots as a posterior around the trained model, which stays as it is.

        Raises:
            ValueError: none was taken.
        """
        if not self.steps:
            raise ValueError("`CyclicalCallback` has taken no snapshot: train with it first.")
        if self.directory is not None:
            return EnsemblePosterior(model, [self._file(step) for step in self.steps])
        return EnsemblePosterior(model, self._snapshots)

    def _file(self, step: int) -> Path:
        assert self.directory is not None  # else they are in memory
        return self.directory / f"snapshot-{step:08d}.safetensors"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the steps of the snapshots, and take up those of a checkpoint."""
        self._check(args, kwargs)
        self._bounds = [cycle * state.max_steps // self.num_cycles for cycle in range(self.num_cycles + 1)]
        self._due = frozenset(self._due_steps())
        self.steps, self._snapshots = [], []
        if state.global_step >= min(self._due):
            tensors, meta = load_beside(FILE, args, state, self.resume_from)
            self.steps = list(meta["steps"])
            self._snapshots = [{} for _ in self.steps if self.directory is None]
            for name, value in tensors.items():
                number, _, key = name.partition("/")
                self._snapshots[int(number)][key] = value

    def _check(self, args: TrainingArguments, kwargs: Any) -> None:
        if is_bayesian(lent_model(kwargs)):
            raise ValueError("`CyclicalCallback` is for a model with one set of weights, and this one is converted.")
        check_chain(kwargs["optimizer"], args)

    def _due_steps(self) -> list[int]:
        """Numbers of finished steps after which a snapshot is taken."""
        found = []
        for begin, end in pairwise(self._bounds):
            first = begin + math.ceil(self.exploration * (end - begin))
            if end - first < self.samples_per_cycle:
                raise ValueError(
                    f"`samples_per_cycle`={self.samples_per_cycle}: a cycle of {end - begin} steps has {end - first} "
                    f"to sample from, with `num_cycles`={self.num_cycles} and `exploration`={self.exploration}."
                )
            number = self.samples_per_cycle
            found += [first + (end - first) * (k + 1) // number for k in range(number)]
        return found

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rate, and whether there is noise, of the step that begins."""
        set_rate(self._rate(state.global_step), kwargs)
        chain = sghmc_in(kwargs["optimizer"])
        if chain is not None:
            for group in chain.param_groups:
                is_sampling = self._place(state.global_step) >= self.exploration
                group["temperature"] = self.temperature if is_sampling else 0.0

    def _rate(self, step: int) -> float:
        return self.lr / 2 * (math.cos(math.pi * self._place(step)) + 1)

    def _place(self, step: int) -> float:
        """Share of its cycle that lies before a step."""
        cycle = bisect_right(self._bounds, step) - 1
        begin, end = self._bounds[cycle : cycle + 2]
        return (step - begin) / (end - begin)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A snapshot, where one is due."""
        set_rate(self._rate(state.global_step - 1), kwargs)  # for the log, which the schedule has written meanwhile
        if state.global_step not in self._due:
            return
        values = _snapshot(lent_model(kwargs))
        self.steps.append(state.global_step)
        if self.directory is None:
            self._snapshots.append(values)
        elif state.is_world_process_zero:
            storage.write(self._file(state.global_step), values, {"step": state.global_step}, kind=_KIND)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The snapshots, or their steps, go into the checkpoint."""
        several = enumerate(self._snapshots)
        tensors = {f"{k}/{name}": value for k, values in several for name, value in values.items()}
        save_beside(FILE, tensors, {"steps": self.steps}, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Every process waits for the files that the main one writes."""
        gathered(None)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """What training moves: Parameters that train, under their first names, and buffers that are saved."""
    own = model.state_dict(keep_vars=True)
    seen: dict[int, str] = {}
    first = {name: t for name, t in own.items() if isinstance(t, Tensor) and seen.setdefault(id(t), name) == name}
    moved = {name: t for name, t in first.items() if t.requires_grad or not isinstance(t, nn.Parameter)}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in moved.items()}
