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

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    set_seed,
)
from transformers.utils import logging

from bayeformers import BayesianTrainer, experiments, metrics, reports
from bayeformers.experiments import (
    BAYESIAN,
    DETERMINISTIC,
    LAPLACE,
    LAPLACE_LAST_LAYER,
    ConllArguments,
    ConllData,
    flag,
)
from bayeformers.laplace import PrecisionChoice
from bayeformers.tasks import CERTAIN, Sentence, at_words, encode_words, write_conll
from examples.data.newswire import PERSON_SHARE, generate
from examples.data.tiny_bert import make_model, make_tokenizer

GENERATED: dict[str, Any] = {
    "learning_rate": 1e-3, "num_train_epochs": 20, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100,
    "warmup_steps": 0.1, "patience": 4, "bayesian_epochs": 12, "bayesian_learning_rate": 1e-3,
    "freeze": False, "delta": 0.4, "prior": '{"type": "normal", "std": 0.1, "centre": 0.0}', "kl_weight": 0.003,
    "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of the generated set: a small model that has never seen a word; as examples.bert_glue's embedded task."""
PRETRAINED: dict[str, Any] = {
    "num_train_epochs": 3, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 2,
}  # fmt: skip
"""Defaults of other data: fine-tuning of a pretrained model."""
HELD_OUT = 256  # validation sentences that choose the Laplace posterior's prior precision
LOG_PRECISIONS = (-1.0, 6.0)  # decimal logarithms between which it is sought
ON_BYTES = ("bloom", "gpt2", "roberta", "deberta", "longformer")
"""Models whose tokenizer works on bytes and wants a blank before each word."""

Draws = list[NDArray[Any]]
"""Of each sentence, log-probabilities (S draws, words, labels)."""
Encoded = tuple[Dataset, list[list[int]]]
"""A set as the model sees it, and the position of each word's first piece, see `encode_words`."""


# --- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class ModelArguments(experiments.ConversionArguments, experiments.LaplaceArguments, experiments.ReportArguments):
    """Which model, and how its posteriors are found."""

    model_name_or_path: str | None = flag(
        None, "Pretrained model: a folder or a hub name. Left out, the generated set gets a tiny BERT."
    )
    method: Literal["variational", "laplace", "all"] = flag(
        "all", "How the posterior is found: the ELBO, the curvature around the trained model, or both."
    )


@dataclass
class TokenTrainingArguments(experiments.BestEpochArguments):
    """Every TrainingArguments flag, for both trainings."""

    output_dir: str | None = flag("outputs/token_classification", "Where models, results, predictions and the PNG go.")
    eval_only: str | None = flag(None, "Train nothing: evaluate the models in this folder, an earlier --output_dir.")


Arguments = tuple[ModelArguments, ConllArguments, TokenTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line; what it does not say is the default of the generated set, or of other data."""
    named = any(vars(experiments.look_ahead(argv, "train_file", "dataset_name")).values())
    groups = (ModelArguments, ConllArguments, TokenTrainingArguments)
    kinds = {"generated set": GENERATED, "other data": PRETRAINED}
    model, data, training = experiments.ExperimentParser(groups, kinds, list(kinds)[named]).parse(argv)
    if named and model.model_name_or_path is None and training.eval_only is None:
        with experiments.user_input():
            raise ValueError(
                "`model_name_or_path` is needed for data of your own: a folder or a hub name, such as bert-base-cased. "
                "Only the generated set makes its own model."
            )
    return model, data, training


# --- Model and pieces ------------------------------------------------------------------------------------------------
def load_model(name_or_path: str | None, data: ConllData) -> tuple[Any, Any]:
    """A pretrained encoder with a head per word, or a tiny BERT; and its tokenizer."""
    labels = data.labels
    names: dict[str, Any] = {"id2label": dict(enumerate(labels))}
    names["label2id"] = {label: index for index, label in names["id2label"].items()}
    if name_or_path is None:
        tokenizer = make_tokenizer(" ".join(sentence.words) for sentence in data.sets["train"])
        config = make_model(len(tokenizer), len(labels)).config
        config.update(names)
        return BertForTokenClassification(config), tokenizer
    on_bytes = AutoConfig.from_pretrained(name_or_path).model_type in ON_BYTES
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **({"add_prefix_space": True} if on_bytes else {}))
    names |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}  # the head may be another task's
    return AutoModelForTokenClassification.from_pretrained(name_or_path, **names), tokenizer


# --- Draws of words --------------------------------------------------------------------------------------------------
def draw_words(trainer: BayesianTrainer, encoded: Encoded) -> Draws:
    """Log-probabilities of every word under each draw of the trainer's posterior, or of its point estimate.

    Draw s is one network (of a Laplace posterior: its linearisation) in every sentence, so that words of one sentence
    vary together, as the probability of a whole entity needs.
    """
    rows, first_pieces = encoded
    drawn = zip(experiments.drawn_logits(trainer, rows.remove_columns("labels")), first_pieces, strict=True)
    return [at_words(logits.log_softmax(-1).numpy(), first) for logits, first in drawn]


def mean_nll(draws: Draws, encoded: Encoded) -> float:
    """-log of the mean probability of the label, averaged over the words that have a piece."""
    rows, first_pieces = encoded
    nlls: list[float] = []
    for log_probs, labels, first in zip(draws, rows["labels"], first_pieces, strict=True):
        mean = np.exp(log_probs.astype(np.float64)).mean(0)
        nlls += [-np.log(max(mean[i, labels[p]], np.exp(CERTAIN))) for i, p in enumerate(first) if p >= 0]
    return float(np.mean(nlls))


def tempered(draws: Draws, temperature: float) -> Draws:
    """softmax(log p / T) of every draw."""
    return [log_softmax(log_probs / temperature, axis=-1) for log_probs in draws]


def fitted_temperature(draws: Draws, sentences: Sequence[Sentence], names: Sequence[str]) -> float:
    """The temperature of least NLL of a point estimate's words."""
    logits = np.concatenate([log_probs[0] for log_probs in draws]).astype(np.float64)
    labels = np.array([names.index(label) for sentence in sentences for label in sentence.labels])
    return float(metrics.fit_temperature(logits, labels))


# --- The run ---------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What fitting or loading leaves: by folder, draws of every word of every set, and what fitting decided."""

    experiment: experiments.Experiment
    sets: dict[str, Encoded]
    draws: dict[str, dict[str, Draws]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    clock: experiments.Clock = field(default_factory=experiments.Clock)

    def finish(self, name: str, trainer: BayesianTrainer, *, save: bool = True) -> None:
        """Save a model and add its draws and facts."""
        self.clock.lap(f"{name}_training")
        if save:
            self.experiment.save(trainer, name)
        self.draws[name] = {of: draw_words(trainer, self.sets[of]) for of in self.sets if of != "train"}
        self.facts[name] = experiments.posterior_facts(trainer)
        self.clock.lap(f"{name}_prediction")


def prepare(arguments: Arguments, data: ConllData, tokenizer: Any) -> Run:
    """Sentences as pieces, and an experiment on them."""
    _, data_args, args = arguments
    sets = {}
    for name, sentences in data.sets.items():
        rows, first_pieces = encode_words(sentences, tokenizer, data.labels, data_args.max_seq_length)
        sets[name] = Dataset.from_list(rows), first_pieces
    collator = DataCollatorForTokenClassification(tokenizer)
    train, validation = sets["train"][0], sets["validation"][0]
    return Run(experiments.Experiment(args, train, validation, collator, tokenizer, data.rows), sets)


def train_and_predict(arguments: Arguments, data: ConllData) -> Run:
    """Fit the point estimate and each posterior around it, save them, and predict with all."""
    how = arguments[0]
    with experiments.user_input():
        model, tokenizer = load_model(how.model_name_or_path, data)
        run = prepare(arguments, data, tokenizer)
    initial = None if how.model_name_or_path is None else copy.deepcopy(model)
    sizes = ", ".join(f"{len(sentences)} {name}" for name, sentences in data.sets.items())
    schemes = f"; labels in {', '.join(sorted(set(data.schemes.values())))}, read as IOB2" if data.schemes else ""
    experiments.say(f"1. Training the deterministic model: {sizes} sentences{schemes}")
    trained = run.experiment.fit(model)
    run.finish(DETERMINISTIC, trained)
    if how.method != "variational":
        experiments.say("2. Laplace: a Gaussian around the trained weights, from the curvature there")
        name = LAPLACE if how.laplace_subset == "all" else LAPLACE_LAST_LAYER
        layers = {"target_modules": how.target_modules, "exclude_modules": how.exclude_modules}
        run.finish(name, fit_laplace(run, trained, name, {**how.laplace, **layers, "prior_mean": initial}))
    if how.method != "laplace":
        experiments.say("3. Making it Bayesian: weights become distributions around the trained ones")
        run.finish(BAYESIAN, run.experiment.fit_variational(trained, how))
    return run


def fit_laplace(run: Run, trained: BayesianTrainer, name: str, options: dict[str, Any]) -> BayesianTrainer:
    """A Gaussian around the trained weights; its prior's mean is the pretrained model's, where there is one.

    "holdout" is the prior precision of least validation NLL of the predictions made here, `draw_words`. The exact
    linearised predictive, which `fit_laplace` would judge, costs a backward pass per position and label.
    """
    if options["prior_precision"] != "holdout":
        return run.experiment.fit_laplace(trained, name, **options)
    trainer = run.experiment.fit_laplace(trained, name, **{**options, "prior_precision": 1.0})
    posterior, (rows, first_pieces) = trainer.posterior, run.sets["validation"]
    size = min(HELD_OUT, len(rows))
    held_out = rows.select(range(size)), first_pieces[:size]

    def nll(log_precision: float) -> float:
        trainer.posterior = posterior.with_prior_precision(10.0**log_precision)
        return mean_nll(draw_words(trainer, held_out), held_out)

    best = minimize_scalar(nll, bounds=LOG_PRECISIONS, method="bounded", options={"xatol": 0.1, "maxiter": 12}).x
    low, high = LOG_PRECISIONS  # xatol keeps it from the ends
    end = "smallest" if best < low + 0.2 else "largest" if best > high - 0.2 else None
    choice = PrecisionChoice(method="holdout", at_grid_end=end)
    trainer.posterior = posterior.with_prior_precision(10.0 ** float(best), choice)
    experiments.say(f"tau = {10.0 ** float(best):.4g}, of least NLL on {size} validation sentences.")
    return trainer


def evaluate_saved(arguments: Arguments, data: ConllData) -> Run:
    """Predict with the models of an earlier run."""
    saved = experiments.saved_models(str(arguments[2].eval_only))
    run = prepare(arguments, data, AutoTokenizer.from_pretrained(next(iter(saved.values()))))
    for name, folder in saved.items():
        run.finish(name, run.experiment.load(name, folder, AutoModelForTokenClassification), save=False)
    return run


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example; the results are returned and, by the main process, printed and written to ``--output_dir``."""
    arguments = model_args, data_args, args = parse_arguments(argv)
    logging.disable_progress_bar()  # of loading and saving weights; the trainings keep theirs
    set_seed(args.seed)
    with experiments.user_input():
        name, trains, saved = model_args.model_name_or_path, args.num_train_epochs > 0, args.eval_only
        past = experiments.past_of(name, trains=trains, eval_only=saved, generated=data_args.is_generated)
        data = experiments.load_conll_data(data_args, args.seed, past, generate=generate)
    run = (evaluate_saved if args.eval_only else train_and_predict)(arguments, data)

    titles = experiments.titles(run.draws)
    draws = {title: run.draws[name] for name, title in titles.items()}
    results: dict[str, Any] = {"seed": args.seed, "processes": args.world_size, "labels": data.labels}
    results |= {"schemes": data.schemes, "facts": {titles[name]: facts for name, facts in run.facts.items()}}
    if point := titles.get(DETERMINISTIC):
        temperature = fitted_temperature(draws[point]["validation"], data.sets["validation"], data.labels)
        scaled = {name: tempered(part, temperature) for name, part in draws[point].items()}
        draws = {point: draws[point], f"{point} + temperature": scaled, **draws}
        results["temperature"] = temperature
    share = PERSON_SHARE if data_args.is_generated else None
    comparison = reports.TaggingComparison(data.reported, data.labels, ambiguous_share=share)
    for title, sets in draws.items():
        comparison.add_draws(title, sets, chosen={"beware": results["facts"].get(title, {}).get("beware")})
    results["methods"] = comparison.reports()
    run.clock.lap("scores")
    results |= {"seconds": run.clock.seconds, "arguments": {**asdict(model_args), **asdict(data_args)}}
    if args.process_index == 0:
        report(run, comparison, results, data.sets if data_args.is_generated else {})
    return results


def report(
    run: Run, comparison: reports.TaggingComparison, results: dict[str, Any], generated: dict[str, list[Sentence]]
) -> None:
    """Print the tables and write the files; the generated sentences too, in CoNLL's format."""
    folder = run.experiment.folder
    figure = comparison.figure(title="Which word, and which entity, is the model unsure of?")
    files = comparison.write(folder, results, figure, figure_name="entities.png")
    for name, sentences in generated.items():
        write_conll(folder / f"{name}.conll", sentences)
        files.append(f"{name}.conll")
    if path := results["arguments"]["report"]:
        experiments.write_page(path, comparison, title="Which word is the model unsure of?")
        files.append(str(path))
    print(f"\n{comparison.tables(results['methods'])}\n\nWritten to {folder}: {', '.join(files)}")


if __name__ == "__main__":
    experiments.run_command(main)
