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

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
from accelerate import PartialState
from optuna.study import Study
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from bayeformers.reports import write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.glue.data import GlueData, load_data
from examples.glue.models import DETERMINISTIC, load_model, load_saved, load_tokenizer
from examples.glue.training import best_delta, fit_deterministic, make_trainer, save
from examples.running import Clock, say
from examples.search.arguments import Arguments, parse_arguments
from examples.search.confirm import BEST, DEFAULTS, confirm, start_history, verdict
from examples.search.figure import FIGURE, write_figure
from examples.search.outputs import format_confirmation, format_trials, trial_row
from examples.search.space import Space, make_space
from examples.search.study import (
    best_found,
    check_start,
    done,
    importances,
    is_default,
    open_study,
    prepare,
    record_start,
    start_delta,
)
from examples.search.trials import run_trials, search_trainer


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    make_space(arguments, delta=arguments.model.delta or 1.0)  # a wrong space is refused before anything is trained
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    args, state, clock = arguments.training, PartialState(), Clock()
    folder = Path(args.output_dir or ".")
    with state.main_process_first():
        study = open_study(folder, arguments.recorded())
        has_start = check_start(study, folder / DETERMINISTIC)

    set_seed(args.seed)
    with user_input():
        data = replace(load_data(arguments.data, args.seed, start_history(arguments)), shifted=None)
    tokenizer = load_tokenizer(arguments.model.model_name_or_path, data)
    data = data.tokenized(tokenizer, arguments.data.max_seq_length)
    if not has_start:
        make_start(study, arguments, data, tokenizer)
    clock.lap("deterministic_training")

    space = make_space(arguments, start_delta(study))
    with state.main_process_first():
        if state.is_main_process:
            prepare(study, space.searched_defaults)
    run_trials(search_trainer(folder / DETERMINISTIC, space, arguments, data, tokenizer), study, space, arguments)
    clock.lap("search")
    results = search_results(study, space, arguments)
    if results["best"] is not None and arguments.search.confirm_seeds:
        chosen = {DEFAULTS: results["defaults"], BEST: results["best"]}
        settings = {name: (row["number"], row["setting"]) for name, row in chosen.items()}
        results["confirmation"] = confirm(settings, arguments)
        results["verdict"] = verdict(results["confirmation"]["difference"]["nll"])
    clock.lap("confirmation")
    results["seconds"] = clock.seconds
    if state.is_main_process:
        report(folder, results)
    state.wait_for_everyone()
    return results


def make_start(study: Study, arguments: Arguments, data: GlueData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train the deterministic model that all trials start from; without ``--delta``, calibrate that of the first."""
    args, state = arguments.training, PartialState()
    folder = Path(args.output_dir or ".") / DETERMINISTIC
    say(f"The deterministic model that every trial starts from: {len(data.train)} training examples")
    model = load_model(arguments.model.model_name_or_path, data.task, tokenizer)
    save(fit_deterministic(model, args, data, tokenizer), data, folder)
    delta = arguments.model.delta
    if delta is None:
        trained = make_trainer(load_saved(DETERMINISTIC, folder), args, data, tokenizer)
        delta = best_delta(trained, arguments.model, args, data)
    state.wait_for_everyone()
    if state.is_main_process:
        record_start(study, folder, delta)
    state.wait_for_everyone()


def search_results(study: Study, space: Space, arguments: Arguments) -> dict[str, Any]:
    """Every number of the search."""
    trials = done(study)
    best = best_found(trials)
    defaults = next(trial for trial in trials if is_default(trial))
    return {
        "task": arguments.data.task_name or "embedded",
        "seed": arguments.training.seed,
        "trials": [trial_row(trial, space) for trial in trials],
        "defaults": trial_row(defaults, space),
        "best": None if best is None else trial_row(best, space),
        "space": {**{name: list(ends) for name, ends in space.ranges.items()}, "prior": list(space.priors)},
        "importances": importances(study),
        "arguments": {**asdict(arguments.search), **arguments.recorded()},
    }


def report(folder: Path, results: dict[str, Any]) -> None:
    """Print the tables and write the two files."""
    write_json(folder / "results.json", results)
    print(f"\n{format_trials(results['trials'])}")
    if results["best"] is None:
        print("\nEvery trial but the defaults was pruned: nothing to confirm.")
    if "confirmation" in results:
        promised = results["best"]["validation_nll"] - results["defaults"]["validation_nll"]
        print(f"\n{format_confirmation(results['confirmation'], promised, results['verdict'])}")
    write_figure(folder / FIGURE, results)
    print(f"\nWritten to {folder}: results.json, {FIGURE}, study.db")


if __name__ == "__main__":
    run_command(main)
