"""Fine-tune a BERT on a GLUE task, make it Bayesian, and compare what both say about how sure they are.

    python -m examples.bert_glue                                      # embedded task: no download, minutes of CPU
    python -m examples.bert_glue --task_name cola --data_dir glue/CoLA --model_name_or_path bert-base-uncased
    python -m examples.bert_glue --method linearized                  # one delta, no further training; or laplace
    python -m examples.bert_glue --method all                         # every method in one table
    torchrun --standalone --nproc_per_node 2 -m examples.bert_glue --use_cpu      # on two processes

Every flag: ``--help``. See docs/glue_example.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer
from bayeformers.delta import BOUNDS, delta_end
from bayeformers.reports import write_json
from examples.commands import run as run_command
from examples.commands import user_input
from examples.glue.arguments import Arguments, DataArguments, ExampleTrainingArguments, parse_arguments
from examples.glue.data import EMBEDDED_TASK, GlueData, load_data
from examples.glue.evaluation import BASELINE, BySet, baseline, method_report, predict_sets, recalibrate
from examples.glue.models import (
    BAYESIAN,
    DETERMINISTIC,
    LAPLACE,
    LAPLACE_LAST_LAYER,
    LINEARIZED,
    load_model,
    load_tokenizer,
    posterior_facts,
    saved_models,
    titles,
)
from examples.glue.outputs import FIGURE, format_results, write_figure, write_predictions
from examples.glue.training import FITS, fit_deterministic, posteriors_to_fit, save, saved_trainer
from examples.held_out import FRESH, History, history_of
from examples.running import Clock, say


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    with user_input():
        data = load_data(data_args, args.seed, history(arguments))
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
    results["held_out"] = held_out_facts(data, data_args)
    results["chosen"] = chosen_by_method(results, named, done.facts)
    scored = {BASELINE: baseline(data), **predictions}
    results["methods"] = {name: method_report(sets, data) for name, sets in scored.items()}
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
    with user_input():
        tokenizer = load_tokenizer(model_args.model_name_or_path, data)
        model = load_model(model_args.model_name_or_path, data.task, tokenizer)
    data = data.tokenized(tokenizer, data_args.max_seq_length)
    folder, run = Path(args.output_dir or "."), Run(data)

    say(f"1. Training the deterministic model: {_sizes(data)}")
    trained = fit_deterministic(model, args, data, tokenizer)
    run.clock.lap(f"{DETERMINISTIC}_training")
    save(trained, data, folder / DETERMINISTIC)
    run.predict(DETERMINISTIC, trained)

    for number, name in enumerate(posteriors_to_fit(model_args), start=2):
        say(f"{number}. {STEPS[name]}")
        trainer = FITS[name](trained, model_args, args, data, tokenizer)
        run.clock.lap(f"{name}_training")
        save(trainer, data, folder / name)
        run.predict(name, trainer)
    return run


STEPS = {
    BAYESIAN: "Making it Bayesian: weights become distributions around the trained ones",
    LINEARIZED: "Bayesian without training: noise delta |w| around the trained weights, linearised",
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


def history(arguments: Arguments) -> History:
    """What is known of the rows that the models which the run starts from were trained on.

    A posterior alone has nothing fitted to held-out rows any more; the embedded task's own test rows depend on it too.
    """
    model_args, data_args, args = arguments
    if args.eval_only is not None:
        saved = saved_models(args.eval_only)
        must_know = DETERMINISTIC in saved or data_args.task_name is None
        found = history_of("eval_only", list(saved.values()), must_know=must_know)
        if data_args.task_name is None and found.record is not None and found.record.task != EMBEDDED_TASK.name:
            raise ValueError(
                f"`eval_only` {args.eval_only} holds models of the task {found.record.task}: `task_name` must be given."
            )
        return found
    if model_args.model_name_or_path is None:
        return FRESH
    untrained = args.num_train_epochs == 0
    return history_of("model_name_or_path", [model_args.model_name_or_path], must_know=untrained)


def _fitted(facts: dict[str, dict[str, Any]], named: dict[str, str]) -> dict[str, Any]:
    """Variational layers have a delta, a Laplace posterior a prior and an evidence."""
    linearized = facts.get(LINEARIZED)
    found = {named[name]: of for name, of in facts.items() if name in (LAPLACE, LAPLACE_LAST_LAYER)}
    variational = {**facts.get(BAYESIAN, {}), **({"linearized": linearized} if linearized else {})}
    return {**variational, **({"laplace": found} if found else {})}


def chosen_by_method(
    results: Mapping[str, Any], named: Mapping[str, str], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What held-out rows, or the evidence, chose for each method; ``beware``: why that should not be believed."""
    chosen: dict[str, dict[str, Any]] = {}
    for key, short in (("temperature", "T"), ("fitted_noise", "noise std")):
        if key in results:
            chosen[f"{named[DETERMINISTIC]} + {key.replace('_', ' ')}"] = {short: results[key]}
    for name, of in facts.items():
        if "delta" in of:
            end = delta_end(of["delta"], *BOUNDS["glm" if name == LINEARIZED else "sample"])
            beware = [f"delta lies at the {end} end of the range that was searched"] if end else []
            chosen[named[name]] = {"delta": of["delta"], "beware": beware}
        elif "prior_precision" in of:
            told = {"tau": of["prior_precision"], "by": of["chosen_by"], "gamma": of["effective_parameters"]}
            chosen[named[name]] = {**told, "N C": of["num_outputs"], "beware": of["beware"]}
    return chosen


def held_out_facts(data: GlueData, data_args: DataArguments) -> dict[str, Any]:
    """Which rows chose."""
    split = None if data.rows is None else {"seed": data.rows.split.seed, **data.rows.split.settings}
    return {"file": data_args.validation_file, "rows": len(data.validation), "split": split}


def report(folder: Path, data: GlueData, predictions: dict[str, BySet], results: dict[str, Any]) -> None:
    """Print the tables and write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_predictions(folder / "predictions.csv", data, predictions)
    written = ["results.json", "predictions.csv"]
    caveats = {name: chosen["beware"] for name, chosen in results["chosen"].items() if chosen.get("beware")}
    if write_figure(folder / FIGURE, data, predictions, caveats):
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
    run_command(main)
