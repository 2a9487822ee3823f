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

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer, bayesian_config, experiments, reports
from bayeformers.experiments import (
    BAYESIAN,
    DETERMINISTIC,
    BestEpochArguments,
    SquadArguments,
    SquadData,
    flag,
    user_input,
)
from bayeformers.tasks import Answers, SpanReader, read_windows
from examples.data.articles import write_articles
from examples.data.tiny_reader import make_model, make_tokenizer

WRITTEN: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 12, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100, "warmup_steps": 0.1, "patience": 4,
    "bayesian_epochs": 8, "bayesian_learning_rate": 1e-3, "freeze": False, "delta": 0.4,
    "prior": '{"type": "normal", "std": 0.125, "centre": 0.0}', "kl_weight": 0.003,
    "max_seq_length": 64, "doc_stride": 16, "max_answer_length": 8,
}  # fmt: skip
"""Defaults of the written articles: a small model that has never seen a word, and over-fits.

Its means train on, under weight noise, with the standard deviation that the weights were initialised with as the
prior's, as in the embedded task of the GLUE example.
"""
FILES: dict[str, Any] = {
    "learning_rate": 3e-5, "num_train_epochs": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 1,
}  # fmt: skip
"""Defaults of real data: fine-tuning of a pretrained model, with the lengths that SQuAD is usually run with."""
WRITTEN_GROUPS = (
    "\nanswerable: one span is right.  ambiguous: two are.  unanswerable: stated of somebody else only.  "
    "shifted: other words, people and towns than in training."
)
METHODS = ("deterministic", "deterministic + temperature", "Bayesian")


# --- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class ModelArguments(experiments.ConversionArguments):
    """Which model, and how it becomes Bayesian."""

    model_name_or_path: str | None = flag(
        None, "Pretrained model: a folder or a hub name. Left out, the written articles get a tiny BERT."
    )


@dataclass
class SquadTrainingArguments(BestEpochArguments):
    """Every TrainingArguments flag, for both trainings."""

    output_dir: str | None = flag("outputs/bert_squad", "Where models, results.json, predictions.csv and the PNG go.")
    num_eval_samples_during_training: int | None = flag(
        4, "Draws of an evaluation within a training, and of the search for delta."
    )


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModelArguments, SquadArguments, SquadTrainingArguments]:
    """The command line; what it does not say is the default of files, or of the written articles."""
    named = any(vars(experiments.look_ahead(argv, *experiments.SQUAD_SOURCES)).values())
    groups = (ModelArguments, SquadArguments, SquadTrainingArguments)
    kinds = {"written articles": WRITTEN, "files": FILES}
    model, data, training = experiments.ExperimentParser(groups, kinds, "files" if named else "written articles").parse(
        argv
    )
    with user_input():
        if named and model.model_name_or_path is None:
            raise ValueError(
                "`model_name_or_path` is needed for questions from files: a folder or a hub name, such as "
                "bert-base-uncased. Only the written articles come with a model."
            )
        experiments.parse_prior(model.prior)
    return model, data, training


# --- From a model to logits of start and end -------------------------------------------------------------------------
def load_model(name_or_path: str | None, data: SquadData, max_length: int) -> tuple[Any, Any]:
    """A pretrained encoder with a span head, new if the checkpoint has none, or a tiny BERT; and its tokenizer."""
    if name_or_path is None:
        tokenizer = make_tokenizer(text for row in data.sets["train"] for text in (row.context, row.text))
        model = make_model(len(tokenizer))
    else:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForQuestionAnswering.from_pretrained(name_or_path)
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < max_length:
        raise ValueError(f"`max_seq_length` must be at most {longest}, all that the model can read, got {max_length}.")
    return model, tokenizer


def predict_logits(
    trainer: BayesianTrainer, readings: Sequence[Any], columns: Mapping[str, list[Any]]
) -> list[torch.Tensor]:
    """Logits of start and end of each question under each draw: (S draws, W windows, T positions, 2)."""
    inputs = Dataset.from_dict({name: column for name, column in columns.items() if "_positions" not in name})
    both = experiments.drawn_logits(
        trainer, inputs, lambda out: torch.stack([out.start_logits, out.end_logits], dim=-1)
    )
    rows, questions = iter(both), []
    for reading in readings:
        windows = [next(rows) for _ in reading.windows]  # (S, T, 2) each, of several lengths
        length = max(window.shape[1] for window in windows)
        padded = [torch.nn.functional.pad(window, (0, 0, 0, length - window.shape[1])) for window in windows]
        questions.append(torch.stack(padded, dim=1))
    return questions


# --- The run ---------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    model_args, data_args, args = parse_arguments(argv)
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    clock = experiments.Clock()
    with user_input():
        past = experiments.past_of(model_args.model_name_or_path, trains=args.num_train_epochs > 0)
        data = experiments.load_squad_data(data_args, args.seed, past, written=write_articles)
        model, tokenizer = load_model(model_args.model_name_or_path, data, data_args.max_seq_length)
        lengths = {"max_length": data_args.max_seq_length, "stride": data_args.doc_stride}
        read = {name: read_windows(questions, tokenizer, **lengths) for name, questions in data.sets.items()}
    train, validation = (Dataset.from_dict(read[name][1]) for name in ("train", "validation"))
    collator = DataCollatorWithPadding(tokenizer)
    experiment = experiments.Experiment(args, train, validation, collator, tokenizer, data.rows)
    clock.lap("data")

    def logits_of(trainer: BayesianTrainer) -> dict[str, list[torch.Tensor]]:
        return {name: predict_logits(trainer, *read[name]) for name in ("validation", *data.reported)}

    def answers(reader: SpanReader, logits: Mapping[str, list[torch.Tensor]]) -> dict[str, Answers]:
        return {name: reader.answers(read[name][0], logits[name]) for name in data.reported}

    sizes = ", ".join(f"{len(questions)} {name}" for name, questions in data.sets.items())
    experiments.say(f"1. Training the deterministic model: {sizes} questions")
    trained = experiment.fit(model)
    experiment.save(trained, DETERMINISTIC)
    clock.lap("deterministic_training")
    logits, reader = logits_of(trained), SpanReader(data_args.max_answer_length, data.asks_unanswerable)
    tempered = reader.tempered(read["validation"][0], logits["validation"])
    found = [answers(reader, logits), answers(tempered, logits)]
    clock.lap("deterministic_answers")

    experiments.say("2. Making it Bayesian: weights become distributions around the trained ones")
    ends, draws = ("start_positions", "end_positions"), args.num_eval_samples_during_training or args.num_eval_samples
    trainer = experiment.fit_variational(trained, model_args, label_columns=ends, num_samples=draws)
    experiment.save(trainer, BAYESIAN)
    clock.lap("bayesian_training")
    found.append(answers(reader, logits_of(trainer)))
    clock.lap("bayesian_answers")

    comparison = reports.AnswerComparison(data.reported)
    for name, sets in zip(METHODS, found, strict=True):
        comparison.add(name, sets)
    results = {
        "data": data.name,
        "questions": {name: len(questions) for name, questions in data.sets.items()},
        "no_answer_is_an_option": reader.has_null,
        "seed": args.seed,
        "processes": args.world_size,
        "temperature": tempered.temperature,
        "delta": bayesian_config(trainer.model).delta,
        "methods": comparison.reports(),
        "differences": comparison.differences(),
        "seconds": clock.seconds,
        "arguments": {**asdict(model_args), **asdict(data_args), "training": args.recorded()},
    }
    clock.lap("report")
    if args.process_index == 0:
        report(experiment, comparison, results, is_written=not data_args.files)
    return results


def report(
    experiment: experiments.Experiment,
    comparison: reports.AnswerComparison,
    results: dict[str, Any],
    *,
    is_written: bool,
) -> None:
    """Print the tables and write the three files."""
    sizes = ", ".join(f"{part.size} {name} questions" for name, part in comparison.sets.items())
    title = f"When is an answer worth giving? {results['data']}: {sizes}"
    caption = "Surest first: by the probability of the answer given, which may be that there is none."
    caption += WRITTEN_GROUPS if is_written else ""
    truth = (math.log(2), f"truth for ambiguous questions (ln 2 = {math.log(2):.3f})") if is_written else None
    figure = comparison.figure(title=title, caption=caption, aleatoric_reference=truth)
    files = comparison.write(experiment.folder, results, figure, figure_name="answers.png")
    tables = comparison.tables(results["methods"], differences=results["differences"])
    print(f"\n{tables}\n\nWritten to {experiment.folder}: {', '.join(files)}")


if __name__ == "__main__":
    experiments.run_command(main)
