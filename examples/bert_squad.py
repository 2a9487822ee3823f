"""Answer questions from texts, SQuAD's task: how sure is the model of its answer, and when should it refuse?

    python -m examples.bert_squad                                  # articles written on the spot: minutes of CPU
    python -m examples.bert_squad --data_dir squad --model_name_or_path bert-base-uncased
    python -m examples.bert_squad --split_by_article dev-v2.0.json --model_name_or_path bert-base-uncased
    torchrun --standalone --nproc_per_node 2 -m examples.bert_squad --use_cpu      # on two processes

Three methods answer: the deterministic model, it with a fitted temperature, and the variational posterior around it. A
Laplace posterior is not among them: `fit_laplace` refuses span heads, whose classes are positions.

Every flag: ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer, bayesian_config
from bayeformers.reports import write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.held_out import FRESH, history_of
from examples.running import Clock, say
from examples.squad.answers import Reader, fit_span_temperature, predict_logits
from examples.squad.arguments import Arguments, parse_arguments
from examples.squad.data import SquadData, load_data
from examples.squad.outputs import FIGURE, format_results, write_figure, write_predictions
from examples.squad.reports import BySet, difference_report, method_report
from examples.squad.spans import SpanLogits
from examples.squad.training import Setting, fit_deterministic, fit_variational, load_model, load_tokenizer
from examples.squad.windows import Readings, read

METHODS = ("deterministic", "deterministic + temperature", "Bayesian")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    named = model_args.model_name_or_path
    with user_input():
        past = history_of("model_name_or_path", [named], must_know=args.num_train_epochs == 0) if named else FRESH
        data = load_data(data_args, args.seed, past)
    reader = Reader(data_args.max_answer_length, data.asks_unanswerable)
    answers, facts, clock = fit_and_answer(arguments, data, reader)

    groups = {name: np.array([question.group for question in questions]) for name, questions in data.reported.items()}
    point, tempered, bayesian = METHODS
    test = {name: by_set["test"] for name, by_set in answers.items()}
    results: dict[str, Any] = {
        "data": data.name,
        "questions": {name: len(questions) for name, questions in data.sets.items()},
        "no_answer_is_an_option": reader.has_null,
        "seed": args.seed,
        "processes": args.world_size,
        **facts,
        "methods": {name: method_report(by_set, groups, reader.has_null) for name, by_set in answers.items()},
        "differences": {
            f"{bayesian} less {other}": difference_report(test[bayesian], test[other]) for other in (point, tempered)
        },
        "seconds": clock.seconds,
        "arguments": _as_dict(arguments),
    }
    clock.lap("report")
    if args.process_index == 0:
        report(Path(args.output_dir or "."), data, answers, results)
    return results


def fit_and_answer(
    arguments: Arguments, data: SquadData, reader: Reader
) -> tuple[dict[str, BySet], dict[str, Any], Clock]:
    """Answers by method and set, what fitting decided, and the seconds that each part took."""
    model_args, data_args, args = arguments
    clock = Clock()
    with user_input():
        tokenizer = load_tokenizer(model_args.model_name_or_path, data)
        model = load_model(model_args.model_name_or_path, tokenizer, data_args.max_seq_length)
    length, stride = data_args.max_seq_length, data_args.doc_stride
    sets = {name: read(found, tokenizer, max_length=length, stride=stride) for name, found in data.sets.items()}
    setting = Setting(model_args, args, sets.pop("train"), sets["validation"], tokenizer, data.rows)
    clock.lap("data")

    say(f"1. Training the deterministic model: {_sizes(data)}")
    trained = fit_deterministic(model, setting)
    clock.lap("deterministic_training")
    logits = _logits(trained, sets)
    temperature = fit_span_temperature(reader, sets["validation"], logits["validation"])
    answers = {METHODS[0]: _answers(reader, sets, logits)}
    answers[METHODS[1]] = _answers(replace(reader, temperature=temperature), sets, logits)
    clock.lap("deterministic_answers")

    say("2. Making it Bayesian: weights become distributions around the trained ones")
    trainer = fit_variational(trained, setting)
    clock.lap("bayesian_training")
    answers[METHODS[2]] = _answers(reader, sets, _logits(trainer, sets))
    clock.lap("bayesian_answers")
    return answers, {"temperature": temperature, "delta": bayesian_config(trainer.model).delta}, clock


def _logits(trainer: BayesianTrainer, sets: Mapping[str, Readings]) -> dict[str, list[SpanLogits]]:
    return {name: predict_logits(trainer, readings) for name, readings in sets.items()}


def _answers(reader: Reader, sets: Mapping[str, Readings], logits: Mapping[str, list[SpanLogits]]) -> BySet:
    return {name: reader.answers(readings, logits[name]) for name, readings in sets.items()}


def report(folder: Path, data: SquadData, answers: dict[str, BySet], results: dict[str, Any]) -> None:
    """Print the tables and write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = {name: np.array([question.group for question in found]) for name, found in data.reported.items()}
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", data, answers)
    write_figure(folder / FIGURE, data, answers, groups)
    print(f"\n{format_results(results)}\n\nWritten to {folder}: results.json, predictions.csv, {FIGURE}")


def _sizes(data: SquadData) -> str:
    return ", ".join(f"{len(questions)} {name}" for name, questions in data.sets.items()) + " questions"


def _as_dict(arguments: Arguments) -> dict[str, Any]:
    model_args, data_args, args = arguments
    training = {key: value for key, value in args.to_sanitized_dict().items() if value is not None}
    training.pop("output_dir", None)
    return {**asdict(model_args), **asdict(data_args), "training": training}


if __name__ == "__main__":
    run_command(main)
