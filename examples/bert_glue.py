"""Fine-tune a BERT on GLUE, TREC or CLINC150, make it Bayesian, and compare what both say about how sure they are.

    python -m examples.bert_glue                                      # embedded task: no download, minutes of CPU
    python -m examples.bert_glue --task_name cola --data_dir glue/CoLA --model_name_or_path bert-base-uncased
    python -m examples.bert_glue --task_name clinc --data_dir clinc --far_task_name trec --far_data_dir trec \\
        --model_name_or_path bert-base-uncased                        # requests of no known intent, and questions
    python -m examples.bert_glue --method linearized                  # one delta, no further training; or laplace
    python -m examples.bert_glue --method all                         # every method in one table
    torchrun --standalone --nproc_per_node 2 -m examples.bert_glue --use_cpu      # on two processes

Every flag: ``--help``. See docs/guides/glue.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

from bayeformers import BayesianTrainer
from bayeformers.experiments import (
    BAYESIAN,
    DETERMINISTIC,
    LAPLACE,
    LAPLACE_LAST_LAYER,
    LINEARIZED,
    BestEpochArguments,
    Clock,
    ConversionArguments,
    Experiment,
    ExperimentParser,
    GlueArguments,
    GlueData,
    LaplaceArguments,
    ReportArguments,
    chosen_by_fit,
    flag,
    load_glue_data,
    look_ahead,
    past_of,
    posterior_facts,
    predict_sets,
    run_command,
    saved_models,
    say,
    titles,
    user_input,
    write_page,
)
from bayeformers.reports import Comparison, recalibrate
from examples.data.grammar import FLIP_RATE, generate
from examples.data.tiny_bert import load_classifier

# --- Arguments -------------------------------------------------------------------------------------------------------
EMBEDDED: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 20, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
    "warmup_steps": 0.1, "patience": 5, "bayesian_epochs": 15, "bayesian_learning_rate": 1e-3,
    "freeze": False, "delta": 0.4, "prior": '{"type": "normal", "std": 0.1, "centre": 0.0}', "kl_weight": 0.003,
    "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of the embedded task: a small model that has never seen a word, and over-fits.

Its means train on, under weight noise, with the standard deviation that the weights were initialised with as the
prior's. Chosen by the validation NLL of three seeds: docs/results/.
"""

PRETRAINED: dict[str, Any] = {
    "num_train_epochs": 4, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 2,
}  # fmt: skip
"""Defaults of a GLUE task: fine-tuning of a pretrained model."""


@dataclass
class ModelArguments(ConversionArguments, LaplaceArguments, ReportArguments):
    """Which model, how it becomes Bayesian, and whether a page of the results is written."""

    model_name_or_path: str | None = flag(
        None, "Pretrained model: a folder or a hub name. Left out, the embedded task makes a tiny BERT."
    )
    method: Literal["variational", "linearized", "laplace", "all"] = flag(
        "variational",
        "How the posterior is found: the ELBO; noise of one held-out delta around the deterministic model, "
        "linearised, without another training (docs/results/ recommends it for pretrained models); the curvature "
        "around that model; or all, with Laplace once for all layers and once for the last.",
    )


@dataclass
class TrainingArguments(BestEpochArguments):
    """Every TrainingArguments flag, for a deterministic training and the ELBO's, and what differs between them."""

    output_dir: str | None = flag("outputs/bert_glue", "Where models, results.json, predictions.csv and the PNG go.")
    eval_only: str | None = flag(None, "Train nothing: evaluate the models in this folder, an earlier --output_dir.")


Arguments = tuple[ModelArguments, GlueArguments, TrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say comes from ``--config``, then from the task's defaults."""
    known = look_ahead(argv, "task_name", "method", config=True)
    kinds = {"embedded task": EMBEDDED, "GLUE tasks": PRETRAINED}
    chosen = "GLUE tasks" if known.task_name else "embedded task"
    parser = ExperimentParser((ModelArguments, GlueArguments, TrainingArguments), kinds, chosen)
    if known.method == "linearized":
        parser.set_defaults(delta=None)  # the embedded task's delta is the ELBO's
    parser.add_config(argv)
    model, data, training = parser.parse(argv)
    if training.eval_only is None:
        with user_input():
            data.check_model(model.model_name_or_path)
    return model, data, training


# --- The run ---------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = parse_arguments(argv)
    model_args, data_args, args = arguments
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    with user_input():
        data = load_data(arguments)
    run = (evaluate_saved if args.eval_only else train_and_predict)(arguments, data)
    comparison, fitted = compare(run)
    results: dict[str, Any] = {
        "task": data.task.name,
        "seed": args.seed,
        "processes": args.world_size,
        "seconds": run.clock.seconds,
        **fitted,
        "held_out": held_out(run.data, data_args),
        "chosen": comparison.chosen,
        "methods": comparison.reports(),
        "arguments": {**asdict(model_args), **asdict(data_args), "training": args.recorded()},
    }
    if args.process_index == 0:
        report(run, comparison, results)
    return results


def load_data(arguments: Arguments) -> GlueData:
    """The task's rows; those that are held out are held out of the trainings of the models that the run starts from."""
    model_args, data_args, args = arguments
    is_embedded = data_args.task_name is None
    trains = args.num_train_epochs > 0
    past = past_of(model_args.model_name_or_path, trains=trains, eval_only=args.eval_only, generated=is_embedded)
    if args.eval_only is not None and is_embedded and past.record is not None and past.record.task != "embedded":
        raise ValueError(
            f"`eval_only` {args.eval_only} holds models of the task {past.record.task}: `task_name` must be given."
        )
    return load_glue_data(data_args, args.seed, past, embedded=generate)


@dataclass
class Run:
    """What fitting or loading leaves: by folder, predictions on every set and facts; the last model's posterior."""

    data: GlueData
    experiment: Experiment
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: tuple[str, Any] = ("", None)
    clock: Clock = field(default_factory=Clock)

    def predict(self, name: str, trainer: BayesianTrainer) -> None:
        """Add a model's predictions and facts."""
        self.predictions[name] = predict_sets(trainer, self.data.predicted)
        self.facts[name], self.last = posterior_facts(trainer), (name, trainer.posterior)
        self.clock.lap(f"{name}_prediction")

    def finish(self, name: str, trainer: BayesianTrainer) -> None:
        """Save a model that was just fitted, and predict with it."""
        self.clock.lap(f"{name}_training")
        self.experiment.save(trainer, name)
        self.predict(name, trainer)


def start(arguments: Arguments, data: GlueData, tokenizer: Any) -> Run:
    """Tokenise the rows; nothing is fitted yet."""
    _, data_args, args = arguments
    data = data.tokenized(tokenizer, data_args.max_seq_length)
    return Run(data, data.experiment(args, tokenizer))


STEPS = {
    LAPLACE_LAST_LAYER: "Laplace, last layer: a Gaussian around the head's trained weights",
    LAPLACE: "Laplace, all layers: a Gaussian around the trained weights, from the curvature there",
    LINEARIZED: "Bayesian without training: noise delta |w| around the trained weights, linearised",
    BAYESIAN: "Making it Bayesian: weights become distributions around the trained ones",
}
"""The posteriors by folder, in the order in which they are fitted."""


def train_and_predict(arguments: Arguments, data: GlueData) -> Run:
    """Fit the point estimate and each posterior around it, save them, and predict with all."""
    how, _, args = arguments
    with user_input():
        tokenizer, model = load_classifier(how.model_name_or_path, data)
    run = start(arguments, data, tokenizer)
    one = {"variational": BAYESIAN, "linearized": LINEARIZED}
    one["laplace"] = LAPLACE if how.laplace_subset == "all" else LAPLACE_LAST_LAYER
    names = list(STEPS) if how.method == "all" else [one[how.method]]

    sizes = {"training": run.data.train, **run.data.predicted}
    say(f"1. Training the deterministic model: {', '.join(f'{len(rows)} {name}' for name, rows in sizes.items())}")
    trained = run.experiment.fit(model)
    run.finish(DETERMINISTIC, trained)
    for number, name in enumerate(names, start=2):
        say(f"{number}. {STEPS[name]}")
        run.finish(name, fit_posterior(name, run.experiment, trained, how))
    return run


def fit_posterior(name: str, experiment: Experiment, trained: BayesianTrainer, how: ModelArguments) -> BayesianTrainer:
    """One of `STEPS` around the trained model, which stays as it is."""
    if name == BAYESIAN:
        return experiment.fit_variational(trained, how)
    if name == LINEARIZED:
        return experiment.fit_linearized(trained, how if how.method == "linearized" else replace(how, delta=None))
    subset = "all" if name == LAPLACE else "last_layer"
    return experiment.fit_laplace(trained, name, **{**how.laplace, "subset": subset})


def evaluate_saved(arguments: Arguments, data: GlueData) -> Run:
    """Predict with the models of an earlier run, in this process or in several: the numbers are the same."""
    saved = saved_models(str(arguments[2].eval_only))
    run = start(arguments, data, AutoTokenizer.from_pretrained(next(iter(saved.values()))))
    for name, folder in saved.items():
        run.predict(name, run.experiment.load(name, folder, AutoModelForSequenceClassification))
    return run


# --- Results ---------------------------------------------------------------------------------------------------------
def compare(run: Run) -> tuple[Comparison, dict[str, Any]]:
    """Every method side by side, and what was fitted: a temperature or noise, delta, a prior and its evidence."""
    data, comparison, fitted = run.data, run.data.comparison(), {}
    comparison.add("majority class", data.baseline(), baseline=True)
    for name, title in titles(run.predictions).items():
        facts = run.facts[name]
        comparison.add(title, run.predictions[name], chosen=chosen_by_fit(name, facts))
        if name == DETERMINISTIC:
            tempered = recalibrate(run.predictions[name], data.validation["label"])
            short = "T" if tempered.name == "temperature" else "noise std"
            method = f"{title} + {tempered.name.replace('_', ' ')}"
            comparison.add(method, tempered.predictions, chosen={short: tempered.value})
            fitted[tempered.name] = tempered.value
        elif name == BAYESIAN:
            fitted |= facts
        elif name == LINEARIZED:
            fitted["linearized"] = facts
        else:
            fitted.setdefault("laplace", {})[title] = facts
    return comparison, fitted


def held_out(data: GlueData, data_args: GlueArguments) -> dict[str, Any]:
    """Which rows chose."""
    split = None if data.rows is None else {"seed": data.rows.split.seed, **data.rows.split.settings}
    return {"file": data_args.validation_file, "rows": len(data.validation), "split": split}


def report(run: Run, comparison: Comparison, results: dict[str, Any]) -> None:
    """Print the tables and write results.json, predictions.csv and the figure."""
    data, held = run.data, results["held_out"]
    others = {name: rows for name, rows in data.reported.items() if name != "test"}
    shifted = "".join(f", {len(rows)} {name} inputs" for name, rows in others.items())
    title = f"How sure is it, and why? Task {data.task.name}: {len(data.test)} test inputs{shifted}"
    figure = comparison.figure(title=title, **(WHAT_IS_KNOWN if data.task.name == "embedded" else {}))
    files = comparison.write(run.experiment.folder, results, figure, figure_name="uncertainty.png")
    if path := results["arguments"]["report"]:
        name, posterior = run.last
        shown = None if posterior is None else (titles(run.predictions)[name], posterior, run.experiment.tokenizer)
        write_page(path, comparison, title=title, texts=data.task.columns, shown=shown)
        files.append(str(path))
    source = f"{held['rows']} rows {held['file'] or 'held out'}"
    if held["split"] is not None and held["file"] is None:
        source += f" by seed {held['split']['seed']}"
    print(f"\n{comparison.tables(results['methods'], source=source)}")
    print(f"\nWritten to {run.experiment.folder}: {', '.join(files)}")


ENTROPY = float(-sum(p * np.log(p) for p in (FLIP_RATE, 1 - FLIP_RATE)))
WHAT_IS_KNOWN = {
    "caption": "Top panels: all test inputs, clean and noisy.\nclean: the grammar decides the label.  noisy: a quarter "
    "of the labels are flipped.  shifted: constructions and words unseen in training.",
    "aleatoric_reference": (ENTROPY, f"truth for noisy inputs ({ENTROPY:.3f})"),
}
"""Of the embedded task, for its figure."""

if __name__ == "__main__":
    run_command(main)
