"""Fine-tune a BERT on a GLUE task, make it Bayesian, and compare what both say about how sure they are.

    python -m examples.bert_glue                                      # embedded task: no download, minutes of CPU
    python -m examples.bert_glue --task_name cola --data_dir glue/CoLA --model_name_or_path bert-base-uncased
    torchrun --standalone --nproc_per_node 2 -m examples.bert_glue --use_cpu      # on two processes

Every flag: ``--help``. See docs/glue_example.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

import bayeformers
from bayeformers import BayesianTrainer
from bayeformers.report import write_json
from examples.glue.arguments import Arguments, ExampleTrainingArguments, parse_arguments
from examples.glue.data import GlueData, load_data
from examples.glue.evaluation import BySet, method_report, predict_sets, recalibrate
from examples.glue.models import BAYESIAN, DETERMINISTIC, load_model, load_tokenizer, saved_models
from examples.glue.outputs import FIGURE, format_results, write_figure, write_predictions
from examples.glue.training import METHODS, fit_deterministic, make_trainer

POINT, POSTERIOR = "deterministic", "Bayesian"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    data = load_data(data_args, args.seed)
    run = evaluate_saved if args.eval_only else train_and_predict
    done = run(arguments, data)
    data, predictions = done.data, done.predictions

    results: dict[str, Any] = {
        "task": data.task.name,
        "seed": args.seed,
        "processes": args.world_size,
        "seconds": done.seconds,
        "delta": done.delta,
    }
    if POINT in predictions:
        tempered = recalibrate(predictions[POINT], data.validation)
        results[tempered.name] = tempered.value
        method = f"{POINT} + {tempered.name.replace('_', ' ')}"
        predictions = {POINT: predictions[POINT], method: tempered.predictions, **predictions}
    results["methods"] = {name: method_report(sets, data) for name, sets in predictions.items()}
    results["arguments"] = {**asdict(model_args), **asdict(data_args), "training": _training_arguments(args)}
    if args.process_index == 0:
        report(Path(args.output_dir or "."), data, predictions, results)
    return results


@dataclass(frozen=True)
class Run:
    """What fitting or loading leaves: tokenised data, each method's predictions, seconds, the posterior's delta."""

    data: GlueData
    predictions: dict[str, BySet]
    seconds: dict[str, float]
    delta: float | None = None


def train_and_predict(arguments: Arguments, data: GlueData) -> Run:
    """Fit both models, save them, and predict with both."""
    model_args, data_args, args = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path, data)
    model = load_model(model_args.model_name_or_path, data.task, tokenizer)
    data = data.tokenized(tokenizer, data_args.max_seq_length)
    folder, clock = Path(args.output_dir or "."), Clock()

    _say(args, f"1. Training the deterministic model: {_sizes(data)}")
    trainer = fit_deterministic(model, args, data, tokenizer)
    clock.lap("deterministic_training")
    trainer.save_model(str(folder / DETERMINISTIC))
    predictions = {POINT: predict_sets(trainer, data)}
    clock.lap("deterministic_prediction")

    _say(args, "2. Making it Bayesian: weights become distributions around the trained ones")
    trainer = METHODS[model_args.method](trainer, model_args, args, data, tokenizer)
    clock.lap("bayesian_training")
    trainer.save_model(str(folder / BAYESIAN))
    _say(args, f"3. Predicting with {args.num_eval_samples} draws of the weights")
    predictions[POSTERIOR] = predict_sets(trainer, data)
    clock.lap("bayesian_prediction")
    return Run(data, predictions, clock.seconds, bayeformers.bayesian_config(trainer.model).delta)


def evaluate_saved(arguments: Arguments, data: GlueData) -> Run:
    """Predict with the models of an earlier run, in this process or in several: the numbers are the same."""
    _, data_args, args = arguments
    saved = saved_models(str(args.eval_only))
    tokenizer = AutoTokenizer.from_pretrained(next(iter(saved.values())))
    data, clock = data.tokenized(tokenizer, data_args.max_seq_length), Clock()
    predictions, delta = {}, None
    for name, folder in saved.items():
        trainer = _saved_trainer(name, folder, args, data, tokenizer)
        predictions[{DETERMINISTIC: POINT, BAYESIAN: POSTERIOR}[name]] = predict_sets(trainer, data)
        clock.lap(f"{name}_prediction")
        if name == BAYESIAN:
            delta = bayeformers.bayesian_config(trainer.model).delta
    return Run(data, predictions, clock.seconds, delta)


def _saved_trainer(
    name: str, folder: Path, args: ExampleTrainingArguments, data: GlueData, tokenizer: PreTrainedTokenizerBase
) -> BayesianTrainer:
    load = bayeformers.from_pretrained if name == BAYESIAN else AutoModelForSequenceClassification.from_pretrained
    return make_trainer(load(folder), args, data, tokenizer)


def report(folder: Path, data: GlueData, predictions: dict[str, BySet], results: dict[str, Any]) -> None:
    """Print the tables and write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", data, predictions)
    written = ["results.json", "predictions.csv"]
    if (
        POINT in predictions
        and POSTERIOR in predictions
        and write_figure(folder / FIGURE, data, predictions, POSTERIOR)
    ):
        written.append(FIGURE)
    print(f"\n{format_results(results)}\n\nWritten to {folder}: {', '.join(written)}")


class Clock:
    """Seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 1)
        self._last = now


def _sizes(data: GlueData) -> str:
    sets = {"training": data.train, "validation": data.validation, **data.reported}
    return ", ".join(f"{len(split)} {name}" for name, split in sets.items())


def _training_arguments(args: ExampleTrainingArguments) -> dict[str, Any]:
    return {
        name: value for name, value in args.to_sanitized_dict().items() if value is not None and name != "output_dir"
    }


def _say(args: ExampleTrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(f"\n{text}", flush=True)


def _leave_process_group() -> None:
    """End a multi-process run together: torn down by the interpreter, gloo's threads abort one rank now and then."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
    _leave_process_group()
