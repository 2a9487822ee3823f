"""Find named entities, and say for every word and every entity how sure that is.

    python -m examples.token_classification                           # generated set: no download, minutes of CPU
    python -m examples.token_classification --train_file eng.train --validation_file eng.testa --test_file eng.testb \\
        --model_name_or_path bert-base-cased                          # files in CoNLL-2003's format
    python -m examples.token_classification --dataset_name user/name --model_name_or_path bert-base-cased     # the hub
    torchrun --standalone --nproc_per_node 2 -m examples.token_classification --use_cpu      # on two processes

The deterministic model, with a temperature, the ELBO and Laplace (linearised, by draws that hold for a whole sentence).
Every flag: ``--help``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer
from bayeformers.reports import write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.conll import evaluation, fitting
from examples.conll.arguments import Arguments, parse_arguments
from examples.conll.data import Encoded, TokenData, encode, load_data
from examples.conll.fitting import Draws, Task
from examples.conll.outputs import FIGURE, BySet, format_results, write_entities, write_figure, write_predictions
from examples.conll.reader import write_conll
from examples.glue.models import BAYESIAN, DETERMINISTIC, LAPLACE, LAPLACE_LAST_LAYER, posterior_facts, saved_models
from examples.glue.models import titles as titles_of
from examples.held_out import FRESH, History, history_of, save_rows
from examples.running import Clock, say

TEMPERED = " + temperature"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    with user_input():
        data = load_data(data_args, args.seed, history(arguments))
    run = (evaluate_saved if args.eval_only else train_and_predict)(arguments, data)

    named = titles_of(run.draws)
    draws = {title: run.draws[name] for name, title in named.items()}
    points = {named[DETERMINISTIC]} if DETERMINISTIC in named else set()
    results: dict[str, Any] = {"seed": args.seed, "processes": args.world_size, "labels": data.labels}
    results |= {"schemes": data.schemes, "facts": {named[name]: facts for name, facts in run.facts.items()}}
    if points:
        point = next(iter(points))
        held_out = draws[point]["validation"]
        temperature = evaluation.fitted_temperature(held_out, data.validation, data.labels)
        scaled = {name: evaluation.tempered(part, temperature) for name, part in draws[point].items()}
        draws = {point: draws[point], point + TEMPERED: scaled, **draws}
        points, results["temperature"] = {point, point + TEMPERED}, temperature
    said = {name: read_sets(of, data) for name, of in draws.items()}
    results["methods"] = {name: method_report(sets, data, is_point=name in points) for name, sets in said.items()}
    run.clock.lap("scores")
    results |= {"seconds": run.clock.seconds, "arguments": {**asdict(model_args), **asdict(data_args)}}
    if args.process_index == 0:
        report(Path(args.output_dir or "."), data, said, results)
    return results


@dataclass
class Run:
    """What fitting or loading leaves: by folder, draws of every word of every set, and what fitting decided."""

    sets: dict[str, Encoded]
    draws: dict[str, dict[str, Draws]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def predict(self, name: str, trainer: BayesianTrainer) -> None:
        """Add a model's draws and facts."""
        self.draws[name] = {of: fitting.draw_words(trainer, part) for of, part in self.sets.items()}
        self.facts[name] = posterior_facts(trainer)
        self.clock.lap(f"{name}_prediction")


def history(arguments: Arguments) -> History:
    """What is known of the rows that the models which the run starts from were trained on."""
    model_args, data_args, args = arguments
    if args.eval_only is not None:
        saved = saved_models(args.eval_only)
        must_know = DETERMINISTIC in saved or data_args.is_embedded
        return history_of("eval_only", list(saved.values()), must_know=must_know)
    named = model_args.model_name_or_path
    return history_of("model_name_or_path", [named], must_know=args.num_train_epochs == 0) if named else FRESH


def train_and_predict(arguments: Arguments, data: TokenData) -> Run:
    """Fit the point estimate and each posterior around it, save them, and predict with all."""
    model_args, data_args, args = arguments
    name_or_path = model_args.model_name_or_path
    with user_input():
        tokenizer = fitting.load_tokenizer(name_or_path, data)
        model = fitting.load_model(name_or_path, data.labels, tokenizer)
    initial = fitting.copy_of(model, name_or_path)
    encoded = _encoded(data, tokenizer, data_args.max_seq_length)
    task = Task(model_args, args, tokenizer, encoded.pop("train"), encoded["validation"], data.rows)
    folder, run = Path(args.output_dir or "."), Run(encoded)

    say(f"1. Training the deterministic model: {_sizes(data)}")
    trained = fitting.fit_deterministic(model, task)
    run.clock.lap(f"{DETERMINISTIC}_training")
    _save(trained, data, folder / DETERMINISTIC)
    run.predict(DETERMINISTIC, trained)
    if model_args.method != "variational":
        name = LAPLACE if model_args.laplace_subset == "all" else LAPLACE_LAST_LAYER
        say("2. Laplace: a Gaussian around the trained weights, from the curvature there")
        _finish(run, name, fitting.fit_laplace(trained, task, initial), data, folder)
    if model_args.method != "laplace":
        say("3. Making it Bayesian: weights become distributions around the trained ones")
        _finish(run, BAYESIAN, fitting.fit_variational(trained, task), data, folder)
    return run


def _save(trainer: BayesianTrainer, data: TokenData, folder: Path) -> None:
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        save_rows(data.rows, folder)


def _finish(run: Run, name: str, trainer: BayesianTrainer, data: TokenData, folder: Path) -> None:
    run.clock.lap(f"{name}_training")
    _save(trainer, data, folder / name)
    run.predict(name, trainer)


def evaluate_saved(arguments: Arguments, data: TokenData) -> Run:
    """Predict with the models of an earlier run."""
    model_args, data_args, args = arguments
    saved = saved_models(str(args.eval_only))
    tokenizer = AutoTokenizer.from_pretrained(next(iter(saved.values())))
    encoded = _encoded(data, tokenizer, data_args.max_seq_length)
    task = Task(model_args, args, tokenizer, encoded.pop("train"), encoded["validation"], data.rows)
    run = Run(encoded)
    for name, folder in saved.items():
        run.predict(name, fitting.make_trainer(fitting.load_saved(name, folder), task, name))
    return run


def _encoded(data: TokenData, tokenizer: Any, max_length: int) -> dict[str, Encoded]:
    sets = {"train": data.train, "validation": data.validation, **data.reported}
    return {name: encode(part, tokenizer, data.labels, max_length) for name, part in sets.items()}


def read_sets(draws: dict[str, Draws], data: TokenData) -> BySet:
    """A method's predictions on the sets that results are about."""
    return {name: evaluation.read_draws(draws[name], part, data.labels) for name, part in data.reported.items()}


def method_report(sets: BySet, data: TokenData, *, is_point: bool) -> dict[str, Any]:
    """Numbers of one method: ``groups``; with ambiguous words ``ambiguous``, with a shifted set ``shift_auroc``."""
    groups = {}
    for group, (name, rows) in evaluation.group_masks(data.reported).items():
        found, gold = [sets[name][i] for i in rows], [data.reported[name][i] for i in rows]
        groups[group] = evaluation.group_report(found, gold, data.labels, is_point=is_point)
    found_report: dict[str, Any] = {"groups": groups}
    if data.person_share is not None and any(one.ambiguous for one in data.test):
        found_report["ambiguous"] = evaluation.ambiguous_report(sets["test"], data.test, data.person_share)
    if data.shifted:
        found_report["shift_auroc"] = evaluation.shift_report(sets["test"], sets["shifted"], is_point=is_point)
    return found_report


def report(folder: Path, data: TokenData, said: dict[str, BySet], results: dict[str, Any]) -> None:
    """Print the tables and write the files; the generated sentences too, in CoNLL's format."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", data, said)
    write_entities(folder / "entities.csv", data, said)
    posteriors = [name for name in said if not name.startswith("deterministic")]
    write_figure(folder / FIGURE, data, said, shown=(posteriors or list(said))[0])
    written = ["results.json", "predictions.csv", "entities.csv", FIGURE]
    if data.person_share is not None:
        for name, part in {"train": data.train, "validation": data.validation, **data.reported}.items():
            write_conll(folder / f"{name}.conll", part)
            written.append(f"{name}.conll")
    print(f"\n{format_results(results)}\n\nWritten to {folder}: {', '.join(written)}")


def _sizes(data: TokenData) -> str:
    sets = {"training": data.train, "validation": data.validation, **data.reported}
    schemes = f"; labels in {', '.join(sorted(set(data.schemes.values())))}, read as IOB2" if data.schemes else ""
    return ", ".join(f"{len(part)} {name}" for name, part in sets.items()) + f" sentences{schemes}"


if __name__ == "__main__":
    run_command(main)
