"""Fine-tune a BERT on a GLUE task, make it Bayesian, and compare what both say about how sure they are.

    python -m examples.bert_glue                                      # embedded task: no download, minutes of CPU
    python -m examples.bert_glue --task_name cola --data_dir glue/CoLA --model_name_or_path bert-base-uncased
    python -m examples.bert_glue --method laplace                     # or all: every method in one table
    torchrun --standalone --nproc_per_node 2 -m examples.bert_glue --use_cpu      # on two processes

Every flag: ``--help``. See docs/glue_example.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer
from bayeformers.report import write_json
from examples.glue.arguments import Arguments, ExampleTrainingArguments, parse_arguments
from examples.glue.data import GlueData, load_data
from examples.glue.evaluation import BySet, method_report, predict_sets, recalibrate
from examples.glue.models import (
    BAYESIAN,
    DETERMINISTIC,
    LAPLACE,
    LAPLACE_LAST_LAYER,
    load_model,
    load_tokenizer,
    posterior_facts,
    saved_models,
    titles,
)
from examples.glue.outputs import FIGURE, format_results, write_figure, write_predictions
from examples.glue.training import FITS, fit_deterministic, posteriors_to_fit, saved_trainer
from examples.running import Clock, leave_process_group, say


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    data = load_data(data_args, args.seed)
    done = (evaluate_saved if args.eval_only else train_and_predict)(arguments, data)
    data, named = done.data, titles(done.predictions)

    results: dict[str, Any] = {
        "task": data.task.name,
        "seed": args.seed,
        "processes": args.world_size,
        "seconds": done.clock.seconds,
        **_fitted(done.facts, named),
    }
    predictions = {title: done.predictions[name] for name, title in named.items()}
    if DETERMINISTIC in named:
        point = named[DETERMINISTIC]
        tempered = recalibrate(predictions[point], data.validation)
        results[tempered.name] = tempered.value
        method = f"{point} + {tempered.name.replace('_', ' ')}"
        predictions = {point: predictions[point], method: tempered.predictions, **predictions}
    results["methods"] = {name: method_report(sets, data) for name, sets in predictions.items()}
    results["arguments"] = {**asdict(model_args), **asdict(data_args), "training": _training_arguments(args)}
    if args.process_index == 0:
        report(Path(args.output_dir or "."), data, predictions, results)
    return results


@dataclass
class Run:
    """What fitting or loading leaves: tokenised data; by folder, predictions and what fitting decided."""

    data: GlueData
    predictions: dict[str, BySet] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def predict(self, name: str, trainer: BayesianTrainer) -> None:
        """Add a model's predictions and facts."""
        self.predictions[name] = predict_sets(trainer, self.data)
        self.facts[name] = posterior_facts(trainer)
        self.clock.lap(f"{name}_prediction")


def train_and_predict(arguments: Arguments, data: GlueData) -> Run:
    """Fit the point estimate and each posterior around it, save them, and predict with all."""
    model_args, data_args, args = arguments
    tokenizer = load_tokenizer(model_args.model_name_or_path, data)
    model = load_model(model_args.model_name_or_path, data.task, tokenizer)
    data = data.tokenized(tokenizer, data_args.max_seq_length)
    folder, run = Path(args.output_dir or "."), Run(data)

    say(f"1. Training the deterministic model: {_sizes(data)}")
    trained = fit_deterministic(model, args, data, tokenizer)
    run.clock.lap(f"{DETERMINISTIC}_training")
    trained.save_model(str(folder / DETERMINISTIC))
    run.predict(DETERMINISTIC, trained)

    for number, name in enumerate(posteriors_to_fit(model_args), start=2):
        say(f"{number}. {STEPS[name]}")
        trainer = FITS[name](trained, model_args, args, data, tokenizer)
        run.clock.lap(f"{name}_training")
        trainer.save_model(str(folder / name))
        run.predict(name, trainer)
    return run


STEPS = {
    BAYESIAN: "Making it Bayesian: weights become distributions around the trained ones",
    LAPLACE: "Laplace, all layers: a Gaussian around the trained weights, from the curvature there",
    LAPLACE_LAST_LAYER: "Laplace, last layer: a Gaussian around the head's trained weights",
}


def evaluate_saved(arguments: Arguments, data: GlueData) -> Run:
    """Predict with the models of an earlier run, in this process or in several: the numbers are the same."""
    _, data_args, args = arguments
    saved = saved_models(str(args.eval_only))
    tokenizer = AutoTokenizer.from_pretrained(next(iter(saved.values())))
    run = Run(data.tokenized(tokenizer, data_args.max_seq_length))
    for name, folder in saved.items():
        run.predict(name, saved_trainer(name, folder, args, run.data, tokenizer))
    return run


def _fitted(facts: dict[str, dict[str, Any]], named: dict[str, str]) -> dict[str, Any]:
    """Variational layers have a delta, a Laplace posterior a prior and an evidence."""
    found = {named[name]: of for name, of in facts.items() if name in (LAPLACE, LAPLACE_LAST_LAYER)}
    return {**facts.get(BAYESIAN, {}), **({"laplace": found} if found else {})}


def report(folder: Path, data: GlueData, predictions: dict[str, BySet], results: dict[str, Any]) -> None:
    """Print the tables and write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", data, predictions)
    written = ["results.json", "predictions.csv"]
    if write_figure(folder / FIGURE, data, predictions):
        written.append(FIGURE)
    print(f"\n{format_results(results)}\n\nWritten to {folder}: {', '.join(written)}")


def _sizes(data: GlueData) -> str:
    sets = {"training": data.train, "validation": data.validation, **data.reported}
    return ", ".join(f"{len(split)} {name}" for name, split in sets.items())


def _training_arguments(args: ExampleTrainingArguments) -> dict[str, Any]:
    return {
        name: value for name, value in args.to_sanitized_dict().items() if value is not None and name != "output_dir"
    }


if __name__ == "__main__":
    main(sys.argv[1:])
    leave_process_group()
