"""The trials: `BayesianTrainer.hyperparameter_search` from one deterministic model, judged by the validation NLL."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import BaseTrial
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayeformers import BayesianTrainer, to_bayesian
from examples.glue.data import GlueData
from examples.glue.models import DETERMINISTIC, load_saved
from examples.glue.training import make_trainer, phase_arguments
from examples.running import say
from examples.search.arguments import Arguments
from examples.search.outputs import trial_line
from examples.search.space import TRAINING, Setting, Space, converted_by
from examples.search.study import NAME, done, storage_of

WARMUP_SHARE = 0.3
"""Of a trial's steps: before, the rates' warm-up says more about its NLL than the setting does."""


def model_factory(start: Path, space: Space, arguments: Arguments) -> Callable[..., PreTrainedModel]:
    """A `model_init`: the trained deterministic model, converted as the trial says."""

    def model_init(trial: BaseTrial | None = None) -> PreTrainedModel:
        setting = space.defaults if trial is None else space.suggest(trial)
        model_args = converted_by(setting, arguments.model)
        return to_bayesian(load_saved(DETERMINISTIC, start), setting["delta"], **model_args.conversion)

    return model_init


def search_trainer(
    start: Path, space: Space, arguments: Arguments, data: GlueData, tokenizer: PreTrainedTokenizerBase
) -> BayesianTrainer:
    """A trainer whose every training begins with the model in the folder ``start``."""
    args = arguments.training
    first = {name: space.defaults[name] for name in TRAINING}
    phase = phase_arguments(args, "search", num_train_epochs=args.bayesian_epochs, **first)
    return make_trainer(None, phase, data, tokenizer, model_init=model_factory(start, space, arguments))


def run_trials(trainer: BayesianTrainer, study: Study, space: Space, arguments: Arguments) -> None:
    """Trials until the study has ``n_trials``, one at a time, so that each is a function of those before it.

    A trial's sampler takes its seed from ``--seed`` and the number of finished trials: a study that was interrupted
    proposes what it would have proposed.
    """
    args, state = arguments.training, PartialState()
    folder, checkpoints = Path(args.output_dir or "."), Path(trainer.args.output_dir or ".")
    pruner = make_pruner(trainer, arguments)
    while (finished := len(done(study))) < arguments.search.n_trials:
        state.wait_for_everyone()  # all have counted
        say(f"{finished} of {arguments.search.n_trials} trials are done")
        trainer.hyperparameter_search(
            hp_space=lambda trial: training_values(space.suggest(trial)),
            compute_objective=objective,
            n_trials=1,
            direction="minimize",
            backend="optuna",
            study_name=NAME,
            storage=storage_of(folder),
            load_if_exists=True,
            sampler=TPESampler(seed=trial_seed(args.seed, finished), n_startup_trials=arguments.search.startup_trials),
            pruner=pruner,
        )
        state.wait_for_everyone()  # the main process has told the study
        if state.is_main_process:
            shutil.rmtree(checkpoints, ignore_errors=True)
        say(trial_line(done(study)[-1], space, study))


def training_values(setting: Setting) -> dict[str, Any]:
    """The part of a setting that is training arguments."""
    return {name: setting[name] for name in TRAINING}


def objective(metrics: dict[str, float]) -> float:
    """Validation NLL, a regression's Gaussian one included; infinite where a training diverged."""
    value = metrics["eval_loss"]
    return value if math.isfinite(value) else math.inf


def trial_seed(seed: int, finished: int) -> int:
    """A seed for the trial after so many.

    >>> trial_seed(0, 1) != trial_seed(0, 2)
    True
    """
    return int(np.random.SeedSequence([seed, finished]).generate_state(1)[0])


def make_pruner(trainer: BayesianTrainer, arguments: Arguments) -> BasePruner:
    """The median rule; none in several processes, of which the main one alone would stop."""
    args = arguments.training
    if not arguments.search.prune or args.world_size > 1:
        return NopPruner()
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.bayesian_epochs)
    return MedianPruner(
        n_startup_trials=arguments.search.startup_trials, n_warmup_steps=math.floor(WARMUP_SHARE * steps)
    )
