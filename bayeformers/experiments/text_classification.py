"""A GLUE task as an experiment sees it: what trains, what is held out of it, and what results are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorWithPadding

from ..reports import (
    ClassPredictions,
    Comparison,
    RegressionPredictions,
    ReportedSet,
    majority_predictions,
    standard_report,
)
from ..tasks import GLUE_TASKS, GlueTask, load_glue, load_tsv
from .arguments import BestEpochArguments, HoldOutArguments
from .command import say
from .phases import Experiment
from .rows import (
    FRESH,
    Hashes,
    History,
    Split,
    TrainingRows,
    check_known,
    check_split_seed,
    fingerprint,
    keep_unseen,
    row_hashes,
    say_split,
)

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED_TASK = replace(GLUE_TASKS["cola"], name="embedded")
"""Acceptability, as CoLA, of sentences that an experiment generates itself."""
Generate = Callable[[int], Mapping[str, Sequence[Any]]]
"""From a seed to "train", "validation", "test" and "shifted": dataclasses with ``group`` and the task's columns."""


@dataclass
class GlueArguments(HoldOutArguments):
    """Which task, and from where."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}. Left out: the embedded acceptability task."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the task's official TSV files, such as glue/CoLA; else the hub's nyu-mll/glue."},
    )
    ood_data_file: str | None = field(
        default=None,
        metadata={
            "help": "TSV file of shifted inputs: the task's layout, or a header with its columns; labels optional."
        },
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "TSV file of labelled rows that choose epochs, temperature, delta and prior precision, laid out as "
            "--ood_data_file; then nothing is held out of train."
        },
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})

    def __post_init__(self) -> None:
        """Refuse an unknown task, and files without a task."""
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in GLUE_TASKS:
                raise ValueError(f"`task_name` must be one of {', '.join(GLUE_TASKS)}, got {self.task_name!r}.")
        elif self.data_dir is not None:
            raise ValueError(f"`data_dir` {self.data_dir!r} needs a `task_name`: {', '.join(GLUE_TASKS)}.")
        super().__post_init__()

    def check_model(self, name_or_path: str | None) -> None:
        """Refuse a GLUE task without a model."""
        if self.task_name is not None and name_or_path is None:
            raise ValueError(
                f"`model_name_or_path` is needed for the task {self.task_name}: a folder or a hub name, such as "
                "bert-base-uncased. Only the embedded task makes its own model."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, with the seed, which rows are held out."""
        share = 0.0 if self.validation_file is not None else self.validation_share
        return {"validation_share": share, "max_train_samples": self.max_train_samples}


@dataclass(frozen=True)
class GlueData:
    """A task's data. Fitting and stopping see `train` and `validation` alone; `test` and `shifted` are only reported.

    ``test`` and ``shifted`` have a column ``group``. ``shifted`` is None where there are no such inputs, and has no
    column ``label`` where they are unlabelled. ``rows``: the record of a model that this run saves; None where it
    cannot be known.
    """

    task: GlueTask
    train: Dataset
    validation: Dataset
    test: Dataset
    shifted: Dataset | None
    rows: TrainingRows | None = None

    @property
    def reported(self) -> dict[str, Dataset]:
        """The sets that results are about."""
        return {"test": self.test, **({} if self.shifted is None else {"shifted": self.shifted})}

    @property
    def predicted(self) -> dict[str, Dataset]:
        """The sets that are predicted: the validation rows too, which choose a temperature."""
        return {"validation": self.validation, **self.reported}

    def tokenized(self, tokenizer: Any, max_length: int) -> GlueData:
        """The same data with the tokenizer's columns added."""

        def tokenize(batch: dict[str, list[Any]]) -> Any:
            return tokenizer(*(batch[name] for name in self.task.columns), truncation=True, max_length=max_length)

        def add(split: Dataset | None) -> Dataset | None:
            return None if split is None else split.map(tokenize, batched=True, desc="tokenizing")

        sets: dict[str, Any] = {name: add(getattr(self, name)) for name in ("train", "validation", "test", "shifted")}
        return replace(self, **sets)

    def experiment(self, args: BestEpochArguments, tokenizer: Any) -> Experiment:
        """The trainings on tokenised rows."""
        collator = DataCollatorWithPadding(tokenizer)
        return Experiment(args, self.train, self.validation, collator, tokenizer, self.rows)

    def comparison(self) -> Comparison:
        """Of methods on the reported sets, by the standard scores and the task's official ones."""
        names = [name for name in ("group", "construction", *self.task.columns) if name in self.test.column_names]
        sets = {
            name: ReportedSet(
                size=len(split),
                labels=list(split["label"]) if "label" in split.column_names else None,
                groups=list(split["group"]),
                columns={column: list(split[column]) for column in names if column in split.column_names},
            )
            for name, split in self.reported.items()
        }
        return Comparison(sets, label_names=self.task.label_names, report=self.report)

    def report(self, predictions: Any, labels: Any = None) -> dict[str, float | None]:
        """The standard numbers of predictions; with labels the task's official metrics before them."""
        official = {}
        if labels is not None:
            is_class = isinstance(predictions, ClassPredictions)
            official = self.task.compute_metrics(predictions.probs.argmax(1) if is_class else predictions.mean, labels)
            official.pop("matthews_correlation", None)  # the standard report's "matthews"
        return {**official, **standard_report(predictions, labels)}

    def baseline(self) -> dict[str, Any]:
        """By predicted set, what one says without looking: the training labels' frequencies, or mean and variance."""
        labels = np.asarray(self.train["label"])
        sizes = {name: len(split) for name, split in self.predicted.items()}
        if not self.task.is_regression:
            return {n: majority_predictions(labels, self.task.num_labels, size) for n, size in sizes.items()}
        mean, variance = float(labels.mean()), float(labels.var())
        return {n: RegressionPredictions(np.full(size, mean), np.full(size, variance)) for n, size in sizes.items()}


def load_glue_data(args: GlueArguments, seed: int, history: History = FRESH, *, embedded: Generate) -> GlueData:
    """The data that the arguments name, split by `seed`, or as the model that the run starts from was.

    Args:
        args: the arguments.
        seed: the run's.
        history: what is known of the rows which that model was trained on.
        embedded: generates the data where no task is named.

    Returns:
        The sets, not tokenised. Missing or malformed files, held-out rows that the model has seen or may have, and a
        hub that cannot be reached are errors that say what to do.
    """
    own = Split(seed if args.split_seed is None else args.split_seed, args.settings)
    history = replace(history, unknown="") if args.split_seed is not None else history
    if args.validation_file is None:
        check_known(history)
    data, source, split = (
        _generated(own, history, embedded) if args.task_name is None else _official(args, own, history)
    )
    check_split_seed(args.split_seed, split)
    if args.validation_file is not None:
        data = _with_validation(data, load_tsv(data.task, args.validation_file))
    data = _unseen_validation(data, args, history)
    rows = history.after(data.task.name, source, split, hashes_of(data.train, data.task))
    if args.ood_data_file is not None:
        data = replace(data, shifted=_grouped(load_tsv(data.task, args.ood_data_file, labelled=None), "shifted"))
    return replace(_limited(data, args), rows=rows)


def hashes_of(split: Dataset, task: GlueTask) -> Hashes:
    """Of each row's texts: a text that was trained on is that under any label."""
    columns = [split[name] for name in task.columns]
    return row_hashes("\x1f".join(map(str, texts)) for texts in zip(*columns, strict=True))


Found = tuple[GlueData, str, Split]
"""The sets, the fingerprint of what they were split from, and how."""


def _generated(own: Split, history: History, embedded: Generate) -> Found:
    """The embedded task, of the record's seed where there is a record of it."""
    from datasets import Dataset

    record = history.record if history.record is not None and history.record.task == EMBEDDED_TASK.name else None
    split = own if record is None else record.split
    splits = {name: Dataset.from_list([vars(row) for row in rows]) for name, rows in embedded(split.seed).items()}
    source = fingerprint(hashes_of(splits["train"], EMBEDDED_TASK))
    if record is not None and record.source != source:
        raise ValueError(f"The model was trained on other sentences of seed {split.seed} than this version generates.")
    say_split("Sentences", Split(own.seed), Split(split.seed))
    return GlueData(EMBEDDED_TASK, **splits), source, split


def _official(args: GlueArguments, own: Split, history: History) -> Found:
    """An official task: the validation set is held out of train, the official one is the test set."""
    task = GLUE_TASKS[str(args.task_name)]
    splits = load_glue(task, args.data_dir, remedy=", or leave out --task_name for the embedded task, which needs none")
    train = splits["train"]
    source = fingerprint(hashes_of(train, task))
    split = history.split(own, source)
    if args.validation_file is None:
        say_split("Held-out rows", own, split)
    limit, share = split.settings["max_train_samples"], split.settings["validation_share"]
    train = train if limit is None else train.select(range(min(limit, len(train))))
    held_out = {"train": train, "test": train.select([])}  # without a share nothing is held out
    if share > 0:
        held_out = train.train_test_split(share, seed=split.seed)
    test = _grouped(splits["validation"], "in-domain")
    shifted = _grouped(splits["shifted"], "shifted") if "shifted" in splits else None
    return GlueData(task, held_out["train"], held_out["test"], test, shifted), source, split


def _with_validation(data: GlueData, validation: Dataset) -> GlueData:
    """Other validation rows, which are held out of train if they are in it."""
    both = np.isin(hashes_of(data.train, data.task), hashes_of(validation, data.task))
    if both.any():
        say(f"{int(both.sum())} training rows are in `validation_file` and are held out.")
    return replace(data, validation=validation, train=data.train.select(np.flatnonzero(~both)))


def _unseen_validation(data: GlueData, args: GlueArguments, history: History) -> GlueData:
    """Without validation rows that the model was trained on; an error where too few are left, or there never were."""
    if len(data.validation) == 0:
        raise ValueError(
            "The model was trained on all of train: `validation_file` must name rows that it has not seen."
        )
    found, train = hashes_of(data.validation, data.task), hashes_of(data.train, data.task)
    kept = history.unseen(found, train)
    what = "validation rows" if args.validation_file is None else f"rows of `validation_file` {args.validation_file}"
    if line := keep_unseen(kept, what):
        say(line)
    return data if kept.all() else replace(data, validation=data.validation.select(np.flatnonzero(kept)))


def _grouped(split: Dataset, group: str) -> Dataset:
    return split.add_column("group", [group] * len(split))


def _limited(data: GlueData, args: GlueArguments) -> GlueData:
    def first(split: Dataset | None, limit: int | None) -> Dataset | None:
        return split if split is None or limit is None else split.select(range(min(limit, len(split))))

    limits = {
        "train": args.max_train_samples,
        **dict.fromkeys(("validation", "test", "shifted"), args.max_eval_samples),
    }
    sets: dict[str, Any] = {name: first(getattr(data, name), limit) for name, limit in limits.items()}
    return replace(data, **sets)
