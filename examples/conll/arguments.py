"""The command line of ``python -m examples.token_classification``: flags and defaults per kind of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from examples.commands import example_parser, look_ahead, parse, user_input
from examples.glue.arguments import ExampleTrainingArguments, ModelArguments

EMBEDDED: dict[str, Any] = {
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

GENERATED_KIND, OTHER_KIND = "generated set", "other data"
"""What --help calls them."""


@dataclass
class TokenModelArguments(ModelArguments):
    """Which model, and how its posteriors are found."""

    method: Literal["variational", "laplace", "all"] = field(
        default="all",
        metadata={"help": "How the posterior is found: the ELBO, the curvature around the trained model, or both."},
    )
    prior_precision: str = field(
        default="holdout",
        metadata={
            "help": "tau of the Laplace posterior's prior N(0, 1/tau): holdout (validation NLL), marglik, "
            "marglik_per_layer (the evidence), or a number."
        },
    )


@dataclass
class TokenDataArguments:
    """Which sentences, and from where."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "CoNLL file: a word per line, its label in the last column. Left out: the generated set."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "CoNLL file; left out, a share of the training sentences is held out."}
    )
    test_file: str | None = field(default=None, metadata={"help": "CoNLL file that the results are about."})
    shifted_file: str | None = field(
        default=None, metadata={"help": "CoNLL file of unfamiliar text, reported beside the test file."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub dataset with splits train, test and perhaps validation."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_column: str = field(default="tokens", metadata={"help": "The hub dataset's column of words."})
    label_column: str = field(default="ner_tags", metadata={"help": "The hub dataset's column of labels."})
    validation_share: float = field(default=0.1, metadata={"help": "Share of train held out without validation data."})
    split_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the held-out sentences, of the generated ones too; if not given, that of the record of "
            "the model that is named, else --seed."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training sentences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each other set."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer sentences are cut to so many pieces."})

    def __post_init__(self) -> None:
        files = (self.train_file, self.validation_file, self.test_file, self.shifted_file)
        if self.dataset_name is not None and any(files):
            raise ValueError(f"`dataset_name` {self.dataset_name!r} and CoNLL files exclude each other: give one.")
        if any(files) and (self.train_file is None or self.test_file is None):
            raise ValueError("`train_file` and `test_file` go together: CoNLL files need both.")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"`validation_share` must lie between 0 and 1, got {self.validation_share}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"`{name}` must be at least 2, got {value}.")

    @property
    def is_embedded(self) -> bool:
        """Whether the generated set is asked for."""
        return self.train_file is None and self.dataset_name is None


@dataclass
class TokenTrainingArguments(ExampleTrainingArguments):
    """Every TrainingArguments flag, for both trainings."""

    output_dir: str | None = field(
        default="outputs/token_classification", metadata={"help": "Where models, results, predictions and the PNG go."}
    )


Arguments = tuple[TokenModelArguments, TokenDataArguments, TokenTrainingArguments]


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say are the defaults of the kind of data.

    Raises:
        SystemExit: an unknown flag, or a value of the wrong type.
        ValueError: a value out of range, or data without a model.
    """
    known = look_ahead(argv, "train_file", "dataset_name")
    kinds = {GENERATED_KIND: EMBEDDED, OTHER_KIND: PRETRAINED}
    chosen = OTHER_KIND if known.train_file or known.dataset_name else GENERATED_KIND
    groups = (TokenModelArguments, TokenDataArguments, TokenTrainingArguments)
    model, data, training = parse(example_parser(groups, kinds, chosen), argv)
    if not data.is_embedded and model.model_name_or_path is None and training.eval_only is None:
        with user_input():
            raise ValueError(
                "`model_name_or_path` is needed for data of your own: a folder or a hub name, such as bert-base-cased. "
                "Only the generated set makes its own model."
            )
    return model, data, training
