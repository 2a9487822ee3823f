"""The optuna study: an SQLite file in the output folder that a later run goes on with."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

NAME = "search"
FILE = "study.db"
_ARGUMENTS, _DETERMINISTIC, _DELTA = "arguments", "deterministic", "delta"
_IS_DEFAULT, _RETRY_OF = "is_default", "retry_of"
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


def storage_of(folder: Path) -> str:
    """The URL of a folder's study."""
    return f"sqlite:///{folder / FILE}"


def open_study(folder: Path, arguments: dict[str, Any]) -> Study:
    """The folder's study, made if there is none.

    Raises:
        ValueError: it was made under other arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(study_name=NAME, storage=storage_of(folder), direction="minimize", load_if_exists=True)
    before = study.user_attrs.get(_ARGUMENTS)
    if before is None:
        study.set_user_attr(_ARGUMENTS, arguments)
        return study
    changed = sorted(name for name in arguments if before.get(name) != arguments[name])
    if changed:
        name = changed[0]
        raise ValueError(
            f"`output_dir` {folder} holds a study with {name}={before.get(name)!r}, got {arguments.get(name)!r}"
            f"{f' ({len(changed)} arguments differ)' if len(changed) > 1 else ''}: its trials are compared under equal "
            "conditions. Give the same arguments to go on, or another --output_dir."
        )
    return study


def digest(model_folder: Path) -> str | None:
    """SHA-256 of the weights in a model's folder; None if there are none."""
    files = sorted(model_folder.glob("*.safetensors"))
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if files else None


def check_start(study: Study, model_folder: Path) -> bool:
    """Whether the model that the trials start from is there.

    Raises:
        ValueError: the study began with another one.
    """
    recorded = study.user_attrs.get(_DETERMINISTIC)
    if recorded is not None and recorded != digest(model_folder):
        raise ValueError(
            f"{model_folder} does not hold the model that the trials of this study start from: put it back, or take "
            "another --output_dir."
        )
    return recorded is not None


def record_start(study: Study, model_folder: Path, delta: float) -> None:
    """Remember which model the trials start from, and the delta of the defaults."""
    study.set_user_attr(_DELTA, delta)
    study.set_user_attr(_DETERMINISTIC, digest(model_folder))  # last: it says that the start is made


def start_delta(study: Study) -> float:
    """The delta of the defaults."""
    return float(study.user_attrs[_DELTA])


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
    return study.get_trials(states=DONE)


def best_found(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial of least objective besides that of the defaults; None if there is none."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and not is_default(trial)]
    return min(complete, key=lambda trial: trial.value, default=None)


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
