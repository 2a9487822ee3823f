"""An optuna study in a folder, which a later run goes on with: every trial starts from the same trained model."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from accelerate import PartialState
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..reports import write_json
from ..reports.search import setting_text
from ..training import BayesianTrainer
from .arguments import BestEpochArguments
from .command import say
from .space import TRAINING, SearchArguments, Space

NAME, FILE = "search", "study.db"
_ARGUMENTS, _START, _DELTA = "arguments", "deterministic", "delta"
_IS_DEFAULT, _RETRY_OF = "is_default", "retry_of"

FREE_TO_CHANGE = {
    *BestEpochArguments.fixed, "save_total_limit", "output_dir", "disable_tqdm", "report_to", "run_name", "project",
    "logging_dir", "logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_level_replica",
    "log_on_each_node", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "draw_cache_bytes", "push_to_hub", "hub_model_id", "hub_token", "push_to_hub_token",
    "local_rank",
}  # fmt: skip
"""Flags that decide nothing about a trial's value."""


def deciding(*groups: Mapping[str, Any]) -> dict[str, Any]:
    """All flags that decide a trial's value, as JSON keeps them: a study goes on under the same alone."""
    flat = {name: value for group in groups for name, value in group.items() if name not in FREE_TO_CHANGE}
    return dict(json.loads(json.dumps(flat, default=str)))


def storage_of(folder: Path) -> str:
    """The URL of a folder's study."""
    return f"sqlite:///{folder / FILE}"


def open_study(folder: Path, arguments: dict[str, Any]) -> Study:
    """The folder's study, made if there is none; one under other arguments is refused, for trials are compared."""
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(study_name=NAME, storage=storage_of(folder), direction="minimize", load_if_exists=True)
    before = study.user_attrs.get(_ARGUMENTS)
    if before is None:
        study.set_user_attr(_ARGUMENTS, arguments)
        return study
    if changed := sorted(name for name in arguments if before.get(name) != arguments[name]):
        name, more = changed[0], f" ({len(changed)} arguments differ)" if len(changed) > 1 else ""
        raise ValueError(
            f"`output_dir` {folder} holds a study with {name}={before.get(name)!r}, got {arguments.get(name)!r}{more}: "
            "its trials are compared under equal conditions. Give the same arguments to go on, or another --output_dir."
        )
    return study


def check_start(study: Study, model_folder: Path) -> bool:
    """Whether the model that the trials start from is there; another one than the study began with is refused."""
    recorded = study.user_attrs.get(_START)
    if recorded is not None and recorded != _digest(model_folder):
        lost = f"{model_folder} does not hold the model that the trials of this study start from"
        raise ValueError(f"{lost}: put it back, or take another --output_dir.")
    return recorded is not None


def record_start(study: Study, model_folder: Path, delta: float) -> None:
    """Remember which model the trials start from, and the delta of the defaults.

    Args:
        study: what remembers it.
        model_folder: where that model's weights are saved.
        delta: of the defaults.
    """
    study.set_user_attr(_DELTA, delta)
    study.set_user_attr(_START, _digest(model_folder))  # last: it says that the start is made


def start_delta(study: Study) -> float:
    """The delta of the defaults."""
    return float(study.user_attrs[_DELTA])


def _digest(model_folder: Path) -> str | None:
    """SHA-256 of the weights in a model's folder; None if there are none."""
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model_folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def prepare(study: Study, defaults: dict[str, Any]) -> None:
    """Mark what a kill left running as failed and queue it again; the first trial is that of the ``defaults``."""
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials()
    if not any(is_default(trial) for trial in trials if trial.state != TrialState.FAIL):
        study.enqueue_trial(defaults, user_attrs={_IS_DEFAULT: True})
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.params and trial.number not in retried and not is_default(trial):
            study.enqueue_trial(trial.params, user_attrs={_RETRY_OF: trial.number})


def is_default(trial: FrozenTrial) -> bool:
    """Whether it is the trial of the defaults."""
    return bool(trial.user_attrs.get(_IS_DEFAULT))


def done(study: Study) -> list[FrozenTrial]:
    """The trials that came to an end, pruned ones included."""
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def best_found(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of least objective besides that of the defaults; None if there is none."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and not is_default(trial)]
    return min(complete, key=lambda trial: trial.value if trial.value is not None else np.inf, default=None)


def trial_seed(seed: int, finished: int) -> int:
    """A seed for the sampler of the trial after so many: an interrupted study proposes what it would have proposed."""
    return int(np.random.SeedSequence([seed, finished]).generate_state(1)[0])


def trial_row(trial: FrozenTrial, setting: dict[str, Any]) -> dict[str, Any]:
    """A trial as `bayeformers.reports.search` takes it; a pruned one's NLL is the least that it reported."""
    reported, pruned = trial.intermediate_values, trial.state == TrialState.PRUNED
    row = {"number": trial.number, "state": trial.state.name.lower(), "is_default": is_default(trial)}
    row["validation_nll"] = min(reported.values()) if pruned and reported else trial.value
    row["steps"] = max(reported, default=0)
    row["seconds"] = trial.duration.total_seconds() if trial.duration else None
    return {**row, "setting": setting}


def importances(study: Study, minimum: int = 10) -> dict[str, float]:
    """Share of each number that all complete trials have; nothing below ``minimum`` of them, where it is noise."""
    complete = study.get_trials(states=[TrialState.COMPLETE])
    if len(complete) < minimum:
        return {}
    common = [name for name in complete[0].params if all(name in trial.params for trial in complete)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=common)
    return {name: float(value) for name, value in found.items()}


def run_trials(study: Study, trainer: BayesianTrainer, space: Space, search: SearchArguments, folder: Path) -> None:
    """Run trials until the study has ``n_trials``, one at a time: each is a function of those before it.

    Args:
        study: the folder's, see `open_study`.
        trainer: has a ``model_init`` that converts the trained model as the trial says.
        space: what a trial may choose.
        search: the number of trials, those at random, and whether any is pruned.
        folder: where the study is stored.
    """
    args, state, pruner = trainer.args, PartialState(), make_pruner(trainer, search)
    while (finished := len(done(study))) < search.n_trials:
        state.wait_for_everyone()  # all have counted
        say(f"{finished} of {search.n_trials} trials are done")
        trainer.hyperparameter_search(
            hp_space=lambda trial: {name: value for name, value in space.suggest(trial).items() if name in TRAINING},
            compute_objective=objective, n_trials=1, direction="minimize", backend="optuna", study_name=NAME,
            storage=storage_of(folder), load_if_exists=True, pruner=pruner,
            sampler=TPESampler(seed=trial_seed(args.seed, finished), n_startup_trials=search.startup_trials),
        )  # fmt: skip
        state.wait_for_everyone()  # the main process has told the study
        if state.is_main_process:
            shutil.rmtree(str(args.output_dir), ignore_errors=True)
        say(_trial_line(done(study), space))


def objective(metrics: dict[str, float]) -> float:
    """Validation NLL, a regression's Gaussian one included; infinite where a training diverged."""
    value = metrics["eval_loss"]
    return value if math.isfinite(value) else math.inf


def make_pruner(trainer: BayesianTrainer, search: SearchArguments, warmup_share: float = 0.3) -> BasePruner:
    """Return the median rule; no pruning in several processes, of which the main one alone would stop.

    Args:
        trainer: of the trials, for the length of a training.
        search: whether to prune, and after how many trials.
        warmup_share: share of a training's steps, those of the rates' warm-up, before which no trial is stopped.
    """
    args = trainer.args
    if not search.prune or args.world_size > 1:
        return NopPruner()
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)
    return MedianPruner(search.startup_trials, n_warmup_steps=math.floor(warmup_share * steps))


def _trial_line(trials: list[FrozenTrial], space: Space) -> str:
    """The last trial in a line, beside the best so far."""
    row = trial_row(trials[-1], space.suggest(trials[-1]))
    complete = [trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None]
    best = min(complete, default=math.inf)
    state = "pruned at" if row["state"] == "pruned" else "validation NLL"
    shown = "  ".join(f"{name} {setting_text(value)}" for name, value in row["setting"].items())
    return f"Trial {row['number']}: {state} {row['validation_nll']:.4f} (best {best:.4f})  {shown}"


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run wrote to a JSON file; else what is made now, written there by the main process."""
    state = PartialState()
    exists = file.is_file()
    state.wait_for_everyone()  # all have looked before one writes
    if not exists:
        made = make()
        if state.is_main_process:
            write_json(file, made)
        state.wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))
