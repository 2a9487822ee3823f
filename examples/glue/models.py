"""The deterministic model and its tokenizer: made on the spot, pretrained, or saved by an earlier run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import bayeformers
from bayeformers import BayesianTrainer, is_bayesian
from bayeformers.laplace import LaplacePosterior
from bayeformers.tasks import GlueTask
from examples.glue.data import GlueData
from examples.glue.tiny_bert import make_model, make_tokenizer

DETERMINISTIC, BAYESIAN = "deterministic", "bayesian"
LAPLACE, LAPLACE_LAST_LAYER = "laplace", "laplace_last_layer"
LINEARIZED = "linearized"
"""Folders of the models within an output folder."""

TITLES = {
    DETERMINISTIC: "deterministic",
    LINEARIZED: "Bayesian, linearised",
    BAYESIAN: "Bayesian",
    LAPLACE_LAST_LAYER: "Laplace last layer",
    LAPLACE: "Laplace all layers",
}
"""What the tables call each model, in their order."""
LAPLACE_FILE = "laplace.safetensors"


def titles(names: Iterable[str]) -> dict[str, str]:
    """Folder -> title, in the tables' order; beside another posterior the ELBO's is called by its method.

    >>> titles(["bayesian", "deterministic"])
    {'deterministic': 'deterministic', 'bayesian': 'Bayesian'}
    >>> titles(["laplace", "bayesian"])
    {'bayesian': 'variational', 'laplace': 'Laplace all layers'}
    """
    found = set(names)
    several = len(found - {DETERMINISTIC}) > 1
    return {
        name: "variational" if name == BAYESIAN and several else title
        for name, title in TITLES.items()
        if name in found
    }


def load_tokenizer(name_or_path: str | None, data: GlueData) -> PreTrainedTokenizerBase:
    """The pretrained tokenizer; without a name, one made from the training sentences."""
    if name_or_path is not None:
        return AutoTokenizer.from_pretrained(name_or_path)
    return make_tokenizer(sentence for name in data.task.columns for sentence in data.train[name])


def load_model(name_or_path: str | None, task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A pretrained encoder with a head for the task; without a name, a tiny BERT."""
    if name_or_path is None:
        model = make_model(len(tokenizer), task.num_labels)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(
            name_or_path,
            num_labels=task.num_labels,
            ignore_mismatched_sizes=True,  # the head of another task
        )
    model.config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if task.label_names:
        model.config.id2label = dict(enumerate(task.label_names))
        model.config.label2id = {name: index for index, name in enumerate(task.label_names)}
    return model


def saved_models(folder: str) -> dict[str, Path]:
    """The models that an earlier run saved: all, or a single one where `folder` itself is a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(folder)
    found = {name: root / name for name in TITLES if (root / name / "config.json").is_file()}
    if not found and (root / "config.json").is_file():
        known = LAPLACE if (root / LAPLACE_FILE).is_file() else BAYESIAN
        found = {root.name if root.name in TITLES else known: root}
    if not found:
        raise FileNotFoundError(
            f"`eval_only` {folder} holds no saved model: it must be an earlier run's --output_dir, with folders such "
            f"as {DETERMINISTIC!r} and {BAYESIAN!r}, or a checkpoint with a posterior."
        )
    return found


def load_saved(name: str, folder: Path) -> PreTrainedModel:
    """The model in a folder of `saved_models`; with a posterior, unless it is the deterministic one."""
    if name == DETERMINISTIC:
        return AutoModelForSequenceClassification.from_pretrained(folder)
    return bayeformers.from_pretrained(folder)


def posterior_facts(trainer: BayesianTrainer) -> dict[str, Any]:
    """What fitting decided: delta of variational layers; prior and evidence of a Laplace posterior."""
    if is_bayesian(trainer.model):
        return {"delta": bayeformers.bayesian_config(trainer.model).delta}
    posterior = trainer.posterior
    if not isinstance(posterior, LaplacePosterior):
        return {}
    return {
        "prior_precision": posterior.prior_precision,
        "noise_std": posterior.noise_std,
        "log_marginal_likelihood": posterior.log_marginal_likelihood,
        "chosen_by": posterior.choice.method,
        "at_grid_end": posterior.choice.at_grid_end,
        "effective_parameters": sum(posterior.effective_parameters.values()),
        "num_outputs": posterior.record.num_outputs,
        "exceeds_data": posterior.exceeds_data,
        "beware": posterior.caveats,
        "num_parameters": sum(target.num_weights for target in posterior.targets),
        "curvature": posterior.record.config.curvature,
        "fisher": posterior.record.config.fisher,
    }
