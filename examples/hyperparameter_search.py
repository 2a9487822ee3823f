r"""Search delta, the prior and its scale, the learning rates and the KL's weight; then confirm on fresh seeds.

    python -m examples.hyperparameter_search                          # embedded task, reduced: minutes of CPU
    python -m examples.hyperparameter_search --n_trials 16            # goes on where the study stands
    python -m examples.hyperparameter_search --output_dir outputs/full_search --n_trials 24 --confirm_seeds 5 \
        --num_train_epochs 20 --bayesian_epochs 15 --num_eval_samples 16 --max_eval_samples 1500
    python -m examples.hyperparameter_search --task_name cola --data_dir glue/CoLA --model_name_or_path bert-base-cased

`BayesianTrainer.hyperparameter_search` with optuna: every trial starts from the same trained deterministic model, and
is judged by the validation NLL of its best epoch. The first trial is the setting that the flags give. Every flag:
``--help``.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.utils import logging

from bayeformers import experiments, reports, to_bayesian
from bayeformers.experiments import DETERMINISTIC, Experiment, GlueArguments, GlueData, flag, say, user_input
from bayeformers.experiments import study as studies
from bayeformers.experiments.space import TRAINING, SearchArguments, Setting, Space, converted_by, make_space
from bayeformers.reports import search
from examples.data.grammar import generate
from examples.data.tiny_bert import load_classifier

# --- Arguments -------------------------------------------------------------------------------------------------------
REDUCED: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 9, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
    "warmup_steps": 0.1, "patience": 5, "bayesian_epochs": 3, "bayesian_learning_rate": 1e-3, "max_eval_samples": 400,
    "freeze": False, "delta": 0.4, "prior": '{"type": "normal", "std": 0.1, "centre": 0.0}', "kl_weight": 0.003,
    "num_eval_samples_during_training": 4, "num_eval_samples": 8,
}  # fmt: skip
"""Defaults of the embedded task: those of bert_glue with shorter trainings and fewer test sentences."""
PRETRAINED: dict[str, Any] = {
    "num_train_epochs": 4, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 2,
}  # fmt: skip


@dataclass
class ModelArguments(experiments.ConversionArguments):
    """Which model, and how it becomes Bayesian."""

    model_name_or_path: str | None = flag(None, "Pretrained model; left out, the embedded task makes a tiny BERT.")
    method: str = flag("variational", "How the posterior is found: the ELBO alone.")

    def __post_init__(self) -> None:
        if self.method != "variational":
            raise ValueError(
                f"`method` must be variational, got {self.method!r}: the one number of the other posteriors, a "
                "prior precision or a delta, bert_glue finds by held-out rows without a study."
            )


@dataclass
class TrainingArguments(experiments.BestEpochArguments):
    """``num_train_epochs`` of the deterministic training, ``bayesian_epochs`` of every trial."""

    output_dir: str | None = flag(
        "outputs/hyperparameter_search",
        "Where the study, the deterministic model and the results go; a study there goes on.",
    )
    eval_only: str | None = flag(None, "Of bert_glue; has no meaning in a search.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_only is not None:
            raise ValueError(f"`eval_only` has no meaning in a search, got {self.eval_only!r}.")
        if self.bayesian_epochs <= 0:
            raise ValueError(f"`bayesian_epochs` must be > 0, got {self.bayesian_epochs}: a trial is a training.")


@dataclass(frozen=True)
class Arguments:
    """All flags, by group."""

    search: SearchArguments
    model: ModelArguments
    data: GlueArguments
    training: TrainingArguments

    def space(self, delta: float) -> Space:
        """What is searched around the flags' setting, whose ``delta`` may have been calibrated."""
        return make_space(self.search, self.model, self.training, delta)

    def recorded(self) -> dict[str, Any]:
        """What decides a trial's value: a study goes on under the same alone."""
        return studies.deciding(self.search.deciding, vars(self.model), vars(self.data), self.training.to_dict())


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from ``--config``, then from the task's defaults."""
    kinds = {"embedded task": REDUCED, "GLUE tasks": PRETRAINED}
    chosen = "GLUE tasks" if experiments.look_ahead(argv, "task_name", config=True).task_name else "embedded task"
    parser = experiments.ExperimentParser(
        (SearchArguments, ModelArguments, GlueArguments, TrainingArguments), kinds, chosen
    )
    parser.add_config(argv)
    arguments = Arguments(*parser.parse(argv))
    with user_input():
        arguments.data.check_model(arguments.model.model_name_or_path)
    return arguments


# --- The run ---------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    arguments.space(delta=arguments.model.delta or 1.0)  # a wrong space is refused before anything is trained
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    state, clock, folder = PartialState(), experiments.Clock(), Path(arguments.training.output_dir or ".")
    with state.main_process_first():
        study = studies.open_study(folder, arguments.recorded())
        has_start = studies.check_start(study, folder / DETERMINISTIC)
    start = make_start(arguments)
    if not has_start:
        train_start(study, start)
    clock.lap("deterministic_training")

    space = arguments.space(studies.start_delta(study))
    with state.main_process_first():
        if state.is_main_process:
            studies.prepare(study, space.searched_defaults)
    run_trials(study, space, start)
    clock.lap("search")
    results = search_results(study, space, arguments)
    if results["best"] is not None and arguments.search.confirm_seeds:
        results["confirmation"] = confirm(results, arguments)
        results["verdict"] = search.verdict(results["confirmation"]["difference"]["nll"])
    clock.lap("confirmation")
    results["seconds"] = clock.seconds
    if state.is_main_process:
        report(folder, results)
    state.wait_for_everyone()
    return results


@dataclass(frozen=True)
class Start:
    """A seed's rows and untrained model, and its folder."""

    arguments: Arguments
    data: GlueData
    model: Any
    experiment: Experiment


def make_start(arguments: Arguments) -> Start:
    """Everything that the seed decides; the rows of a model that is trained already decide the split instead."""
    how, data_args, args = arguments.model, arguments.data, arguments.training
    set_seed(args.seed)
    with user_input():
        past = experiments.past_of(how.model_name_or_path, trains=args.num_train_epochs > 0)
        data = replace(
            experiments.load_glue_data(data_args, args.seed, past, embedded=generate), shifted=None, far=None
        )
    tokenizer, model = load_classifier(how.model_name_or_path, data)
    data = data.tokenized(tokenizer, data_args.max_seq_length)
    return Start(arguments, data, model, data.experiment(args, tokenizer))


def train_start(study: optuna.Study, start: Start) -> None:
    """Train the deterministic model that all trials start from; without ``--delta``, calibrate that of the first."""
    experiment, state, how = start.experiment, PartialState(), start.arguments.model
    say(f"The deterministic model that every trial starts from: {len(start.data.train)} training examples")
    trained = experiment.fit(start.model)
    experiment.save(trained, DETERMINISTIC)
    delta = experiment.best_delta(trained, how.conversion) if how.delta is None else how.delta
    state.wait_for_everyone()
    if state.is_main_process:
        studies.record_start(study, experiment.folder / DETERMINISTIC, delta)
    state.wait_for_everyone()


def run_trials(study: optuna.Study, space: Space, start: Start) -> None:
    """Trials until the study has ``n_trials``: conversions of the same trained model, as each trial says."""
    arguments, experiment = start.arguments, start.experiment

    def model_init(trial: optuna.trial.BaseTrial | None = None) -> Any:
        setting = space.defaults if trial is None else space.suggest(trial)
        model = experiments.load_saved(
            DETERMINISTIC, experiment.folder / DETERMINISTIC, AutoModelForSequenceClassification
        )
        return to_bayesian(model, setting["delta"], **converted_by(setting, arguments.model).conversion)

    changes: dict[str, Any] = {name: space.defaults[name] for name in TRAINING}
    changes["num_train_epochs"] = arguments.training.bayesian_epochs
    trainer = experiment.trainer(None, "search", model_init=model_init, **changes)
    studies.run_trials(study, trainer, space, arguments.search, experiment.folder)


# --- Confirmation ----------------------------------------------------------------------------------------------------
# The best of many trials is in part the luckiest: on the validation data that chose it, it looks better than it is.
# Fresh seeds bring other sentences (embedded task) or another held-out share (GLUE), another initialisation and noise.
def confirm(results: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    """Best setting and defaults, trained again on fresh seeds: reports by method, and the paired difference."""
    rows = {search.DEFAULTS: results["defaults"], search.BEST: results["best"]}
    seeds = [arguments.training.seed + 1000 + index for index in range(arguments.search.confirm_seeds)]
    runs = [confirm_seed(seed, rows, arguments) for seed in seeds]
    methods = {name: [run[name] for run in runs] for name in runs[0]}
    difference = search.paired_difference(methods[search.BEST], methods[search.DEFAULTS])
    return {"seeds": seeds, "methods": methods, "difference": difference}


def fresh_start(seed: int, arguments: Arguments) -> Start:
    """Another seed, in a folder of its own."""
    args = copy.deepcopy(arguments.training)
    args.seed, args.output_dir = seed, str(Path(args.output_dir or ".") / "confirm" / f"seed-{seed}")
    return make_start(replace(arguments, training=args))


def confirm_seed(seed: int, rows: Mapping[str, Any], arguments: Arguments) -> dict[str, Any]:
    """A deterministic model of this seed, and one posterior around it for each setting."""
    start = fresh_start(seed, arguments)
    folder = start.experiment.folder
    made: dict[str, Any] = studies.kept(folder / f"{DETERMINISTIC}.json", lambda: point_reports(start))
    for name, row in rows.items():
        file = folder / f"trial-{row['number']}.json"
        if not file.is_file():
            say(f"Confirmation, seed {seed}: {name} (trial {row['number']})")
        made[name] = studies.kept(file, partial(setting_report, start, row["setting"]))
    return made


def point_reports(start: Start) -> dict[str, Any]:
    """Train and save the deterministic model; reports of it, as it is and with a temperature."""
    say(f"Confirmation, seed {start.arguments.training.seed}: the deterministic model")
    trained = start.experiment.fit(start.model)
    start.experiment.save(trained, DETERMINISTIC)
    point = experiments.predict_sets(trained, start.data.predicted)
    tempered = reports.recalibrate(point, start.data.validation["label"]).predictions
    both = {DETERMINISTIC: point, f"{DETERMINISTIC} + temperature": tempered}
    return {name: test_report(predictions, start.data) for name, predictions in both.items()}


def setting_report(start: Start, setting: Setting) -> dict[str, Any]:
    """Train the setting from the seed's deterministic model, as a trial does; nothing but the report is kept."""
    args = copy.deepcopy(start.arguments.training)
    args.bayesian_learning_rate = setting["learning_rate"]
    args.rho_learning_rate, args.kl_weight = setting["rho_learning_rate"], setting["kl_weight"]
    experiment = replace(start.experiment, args=args)
    trained = experiment.load(DETERMINISTIC, experiment.folder / DETERMINISTIC, AutoModelForSequenceClassification)
    trainer = experiment.fit_variational(trained, converted_by(setting, start.arguments.model))
    report = test_report(experiments.predict_sets(trainer, start.data.predicted), start.data)
    if args.process_index == 0:
        shutil.rmtree(experiment.folder / "checkpoints", ignore_errors=True)
    return report


def test_report(predictions: Mapping[str, Any], data: GlueData) -> dict[str, Any]:
    """Scores on the test set, and the NLL on the validation set that the search judges by."""
    sets = {"validation": data.validation, "test": data.test}
    of = {name: data.report(predictions[name], list(rows["label"])) for name, rows in sets.items()}
    return {**of["test"], "validation_nll": of["validation"]["nll"]}


# --- Results ---------------------------------------------------------------------------------------------------------
def search_results(study: optuna.Study, space: Space, arguments: Arguments) -> dict[str, Any]:
    """Every number of the search."""
    trials = studies.done(study)
    rows = {trial.number: studies.trial_row(trial, space.suggest(trial)) for trial in trials}
    best = studies.best_found(trials)
    return {
        "task": arguments.data.task_name or "embedded",
        "seed": arguments.training.seed,
        "trials": list(rows.values()),
        "defaults": next(row for row in rows.values() if row["is_default"]),
        "best": None if best is None else rows[best.number],
        "space": {**{name: list(ends) for name, ends in space.ranges.items()}, "prior": list(space.priors)},
        "importances": studies.importances(study),
        "arguments": {**asdict(arguments.search), **arguments.recorded()},
    }


def report(folder: Path, results: dict[str, Any]) -> None:
    """Print the tables and write the two files."""
    reports.write_json(folder / "results.json", results)
    print(f"\n{search.trials_table(results['trials'])}")
    if results["best"] is None:
        print("\nEvery trial but the defaults was pruned: nothing to confirm.")
    if "confirmation" in results:
        print(f"\n{search.confirmation_text(results)}")
    reports.save_figure(search.search_figure(results), folder / "search.png", dpi=85)
    print(f"\nWritten to {folder}: results.json, search.png, study.db")


if __name__ == "__main__":
    experiments.run_command(main)
