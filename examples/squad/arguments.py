"""The command line of ``python -m examples.bert_squad``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.commands import example_parser, look_ahead, parse, user_input
from examples.glue.arguments import TwoTrainingsArguments, parse_prior

WRITTEN: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 12, "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 100, "warmup_steps": 0.1, "patience": 4,
    "bayesian_epochs": 8, "bayesian_learning_rate": 1e-3, "freeze": False, "delta": 0.4,
    "prior": '{"type": "normal", "std": 0.125, "centre": 0.0}', "kl_weight": 0.003,
    "max_seq_length": 64, "doc_stride": 16, "max_answer_length": 8,
    "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of the written articles: a small model that has never seen a word, and over-fits.

Its means train on, under weight noise, with the standard deviation that the weights were initialised with as the
prior's, as in the embedded task of the GLUE example.
"""

PRETRAINED: dict[str, Any] = {
    "learning_rate": 3e-5, "num_train_epochs": 2, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
    "warmup_steps": 0.1, "patience": 2, "bayesian_epochs": 1,
    "max_seq_length": 384, "doc_stride": 128, "max_answer_length": 30,
    "num_eval_samples_during_training": 4,
}  # fmt: skip
"""Defaults of real data: fine-tuning of a pretrained model, with the lengths that SQuAD is usually run with."""


@dataclass
class ModelArguments:
    """Which model, and how it becomes Bayesian."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Pretrained model: a folder or a hub name. Left out, the written articles get a tiny BERT."},
    )
    delta: float | None = field(
        default=None,
        metadata={"help": "Initial posterior scale relative to |weight|; if not given, that of least validation NLL."},
    )
    freeze: bool = field(default=True, metadata={"help": "Train the scales only; --no_freeze trains the means too."})
    prior: str = field(
        default="moped",
        metadata={"help": 'moped, normal, scale_mixture, empirical_bayes, or JSON: {"type": "normal", "std": 0.1}.'},
    )
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Name suffixes of the layers to make Bayesian; all if not given."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Name suffixes of layers that stay deterministic."}
    )

    @property
    def conversion(self) -> dict[str, Any]:
        """The arguments of `to_bayesian` besides ``delta``."""
        return {
            "freeze": self.freeze,
            "prior": parse_prior(self.prior),
            "target_modules": self.target_modules or "all",
            "exclude_modules": self.exclude_modules,
        }


@dataclass
class DataArguments:
    """Which questions, and how long texts and answers may be."""

    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the official train-v*.json and dev-v*.json; dev is reported as the test set."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training questions: SQuAD's JSON, v1.1 or v2.0."})
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Questions that choose epochs, delta and temperature, if there is a --test_file; else those that "
            "are reported, such as the official dev set. What chooses is then held out of train, by article."
        },
    )
    test_file: str | None = field(default=None, metadata={"help": "Questions that are reported and choose nothing."})
    split_by_article: str | None = field(
        default=None,
        metadata={"help": "One file for all: its articles are dealt out by --validation_share, --test_share, --seed."},
    )
    shifted_file: str | None = field(
        default=None, metadata={"help": "More questions to report on, of another kind than those trained on."}
    )
    validation_share: float = field(
        default=0.2, metadata={"help": "Share of questions, in whole articles, that validation is given of train."}
    )
    test_share: float = field(default=0.2, metadata={"help": "The same for the test set of --split_by_article."})
    split_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the held-out articles, of the written ones too; if not given, that of the record of the "
            "model that is named, else --seed."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training questions."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each other set."})
    max_seq_length: int = field(
        default=384, metadata={"help": "Tokens of question and text together; a longer text is read in windows."}
    )
    doc_stride: int = field(default=128, metadata={"help": "Tokens of the text that two windows share."})
    max_answer_length: int = field(
        default=30, metadata={"help": "Longest answer in tokens; at most --doc_stride, so that one window holds it."}
    )

    def __post_init__(self) -> None:
        self._check_sources()
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 0.5:
                raise ValueError(f"`{name}` must lie between 0 and 0.5, got {getattr(self, name)}.")
        for name in ("max_train_samples", "max_eval_samples"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"`{name}` must be at least 2, got {value}.")
        if not 0 < self.max_answer_length <= self.doc_stride < self.max_seq_length:
            raise ValueError(
                "`max_answer_length`, `doc_stride` and `max_seq_length` must be 0 < answer <= stride < sequence, got "
                f"{self.max_answer_length}, {self.doc_stride} and {self.max_seq_length}: an answer must fit into what "
                "two windows share, or it could be cut in both."
            )

    def _check_sources(self) -> None:
        ways = ("data_dir", "train_file", "split_by_article")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`data_dir`, `train_file` and `split_by_article` exclude each other, got {given}.")
        others = [name for name in ("validation_file", "test_file") if getattr(self, name) is not None]
        if others and given != ["train_file"]:
            raise ValueError(f"`{others[0]}` {getattr(self, others[0])!r} needs a `train_file`.")
        if given == ["train_file"] and not others:
            raise ValueError(
                f"`train_file` {self.train_file!r} needs a `validation_file` or a `test_file` to report on; "
                "--split_by_article makes all three of one file."
            )

    @property
    def files(self) -> dict[str, str]:
        """The official files by set; none: the articles are written on the spot.

        Raises:
            FileNotFoundError, ValueError: ``data_dir`` does not hold one version's two files.
        """
        if self.split_by_article is not None:
            return {"train": self.split_by_article}
        if self.data_dir is not None:
            return {"train": _official(self.data_dir, "train"), "test": _official(self.data_dir, "dev")}
        if self.train_file is None:
            return {}
        if self.test_file is None:
            return {"train": self.train_file, "test": str(self.validation_file)}
        held_out = {} if self.validation_file is None else {"validation": self.validation_file}
        return {"train": self.train_file, **held_out, "test": self.test_file}


def _official(folder: str, split: str) -> str:
    found = sorted(Path(folder).glob(f"{split}-v*.json"))
    if not found:
        raise FileNotFoundError(f"`data_dir` {folder} has no {split}-v1.1.json or {split}-v2.0.json.")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"`data_dir` {folder} has {names}: say which by --train_file and --validation_file.")
    return str(found[0])


@dataclass
class ExampleTrainingArguments(TwoTrainingsArguments):
    """Those of this example."""

    output_dir: str | None = field(
        default="outputs/bert_squad", metadata={"help": "Where models, results.json, predictions.csv and the PNG go."}
    )
    bayesian_epochs: float = field(default=2.0, metadata={"help": "Epochs of the ELBO's training."})


Arguments = tuple[ModelArguments, DataArguments, ExampleTrainingArguments]
SOURCES = ("data_dir", "train_file", "split_by_article")
WRITTEN_KIND, FILES_KIND = "written articles", "files"
"""What --help calls them."""


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The command line's arguments; what it does not say is the default of real data, or of the written articles.

    Raises:
        ValueError: flags that exclude each other, or a value out of its range.
        SystemExit: an unknown flag, or a value of the wrong type.
    """
    known = look_ahead(argv, *SOURCES)
    has_files = any(getattr(known, name) is not None for name in SOURCES)
    kinds = {WRITTEN_KIND: WRITTEN, FILES_KIND: PRETRAINED}
    groups = (ModelArguments, DataArguments, ExampleTrainingArguments)
    model, data, training = parse(example_parser(groups, kinds, FILES_KIND if has_files else WRITTEN_KIND), argv)
    with user_input():
        if has_files and model.model_name_or_path is None:
            raise ValueError(
                "`model_name_or_path` is needed for questions from files: a folder or a hub name, such as "
                "bert-base-uncased. Only the written articles come with a model."
            )
        parse_prior(model.prior)
    return model, data, training
