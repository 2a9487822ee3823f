"""The deterministic model and its tokenizer: made on the spot, pretrained, or saved by an earlier run."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bayeformers.tasks import GlueTask
from examples.glue.data import GlueData
from examples.glue.tiny_bert import make_model, make_tokenizer

DETERMINISTIC, BAYESIAN = "deterministic", "bayesian"
"""Folders of the two models within an output folder."""


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
    """The models that an earlier run saved: both, or a single one where `folder` itself is a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(folder)
    found = {name: root / name for name in (DETERMINISTIC, BAYESIAN) if (root / name / "config.json").is_file()}
    if not found and (root / "config.json").is_file():
        found = {BAYESIAN: root}
    if not found:
        raise FileNotFoundError(
            f"`eval_only` {folder} holds no saved model: it must be an earlier run's --output_dir, with the folders "
            f"{DETERMINISTIC!r} and {BAYESIAN!r}, or a Bayesian checkpoint."
        )
    return found
