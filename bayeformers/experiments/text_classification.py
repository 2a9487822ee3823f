"""A task of texts as an experiment sees it: what trains, what is held out of it, and what results are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ..tasks import GLUE_TASKS, TEXT_TASKS, GlueTask, load_text_task, load_tsv
from .arguments import BestEpochArguments, HoldOutArguments, flag
from .command import say
from .phases import Experiment
from .rows import FRESH, Hashes, History, Split, TrainingRows, row_hashes
from .splits import RowKind, hold_out

if TYPE_CHECKING:
    from datasets import Dataset

EMBEDDED_TASK = replace(GLUE_TASKS["cola"], name="embedded")
"""Acceptability, as CoLA, of sentences that an experiment generates itself."""
Generate = Callable[[int], Mapping[str, Sequence[Any]]]
"""From a seed to "train", "validation", "test" and "shifted": dataclasses with ``group`` and the task's columns."""


@dataclass
class GlueArguments(HoldOutArguments):
    """Which task, and from where."""

    task_name: str | None = flag(None, f"Task: {', '.join(TEXT_TASKS)}. Left out: the embedded acceptability task.")
    data_dir: str | None = flag(
        None, "Folder of the task's official files, such as glue/CoLA, trec or clinc; else the hub's copy."
    )
    ood_data_file: str | None = flag(
        None, "TSV file of shifted inputs: the task's layout, or a header with its columns; labels optional."
    )
    far_task_name: str | None = flag(
        None, "Another task, whose reported texts are inputs far from this one's, unlabelled: the set far."
    )
    far_data_dir: str | None = flag(None, "Folder of that task's official files; else the hub's copy.")
    validation_file: str | None = flag(
        None,
        "TSV file of labelled rows that choose epochs, temperature, delta and prior precision, laid out as "
        "--ood_data_file; then nothing is held out of train.",
    )
    max_seq_length: int = flag(128, "Longer inputs are cut to so many tokens.")

    def __post_init__(self) -> None:
        """Refuse an unknown task, and files without a task."""
        for task, folder in (("task_name", "data_dir"), ("far_task_name", "far_data_dir")):
            name, path = getattr(self, task), getattr(self, folder)
            if name is not None:
                setattr(self, task, name.lower())
                if name.lower() not in TEXT_TASKS:
                    raise ValueError(f"`{task}` must be one of {', '.join(TEXT_TASKS)}, got {name!r}.")
            elif path is not None:
                raise ValueError(f"`{folder}` {path!r} needs a `{task}`: {', '.join(TEXT_TASKS)}.")
        if self.far_task_name is not None:
            check_far(self.task_name, self.far_task_name)
        super().__post_init__()

    def check_model(self, name_or_path: str | None) -> None:
        """Refuse a task of real texts without a model."""
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

    ``test``, ``shifted`` and ``far`` have a column ``group``. ``shifted`` and ``far`` are None where there are no such
    inputs, and have no column ``label`` where they are unlabelled. ``rows``: the record of a model that this run saves;
    None where it cannot be known.
    """

    task: GlueTask
    train: Dataset
    validation: Dataset
    test: Dataset
    shifted: Dataset | None
    rows: TrainingRows | None = None
    far: Dataset | None = None

    @property
    def reported(self) -> dict[str, Dataset]:
        """The sets that results are about."""
        others = {"shifted": self.shifted, "far": self.far}
        return {"test": self.test, **{name: rows for name, rows in others.items() if rows is not None}}

    @property
    def predicted(self) -> dict[str, Dataset]:
        """The sets that are predicted: the validation rows too, which choose a temperature."""
        return {"validation": self.validation, **self.reported}

    def tokenized(self, tokenizer: Any, max_length: int) -> GlueData:
        """The same data with the tokenizer's columns added."""

        def tokenize(batch: dict[str, list[Any]]) -> Any:
            return tokenizer(*(batch[name] for name in self.task.columns), truncation=True, max_length=max_length)

        sets: Any = {"train": self.train, **self.predicted}
        return replace(self, **{name: of.map(tokenize, batched=True, desc="tokenizing") for name, of in sets.items()})

    def experiment(self, args: BestEpochArguments, tokenizer: Any) -> Experiment:
        """The trainings on tokenised rows."""
        collator = DataCollatorWithPadding(tokenizer)
        return Experiment(args, self.train, self.validation, collator, tokenizer, self.rows)

    def comparison(self) -> Comparison:
        """Of methods on the reported sets, by the standard scores and the task's official ones."""
        names = [name for name in ("group", "construction", *self.task.columns) if name in self.test.column_names]

        def reported(split: Dataset) -> ReportedSet:
            columns = {name: list(split[name]) for name in (*names, "label") if name in split.column_names}
            labels = columns.pop("label", None)
            return ReportedSet(len(split), labels, columns["group"], columns)

        sets = {name: reported(split) for name, split in self.reported.items()}
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
    """Return the data that the arguments name, split by `seed`, or as the model that the run starts from was.

    Held-out rows that the model has seen or may have, missing or malformed files, and a hub that cannot be reached are
    errors that say what to do.

    Args:
        args: the arguments.
        seed: the run's.
        history: what is known of the rows which that model was trained on.
        embedded: generates the data where no task is named.
    """
    from datasets import Dataset

    task, file = EMBEDDED_TASK if args.task_name is None else TEXT_TASKS[args.task_name], args.validation_file
    official = {}
    if args.task_name is not None:
        remedy = ", or leave out --task_name for the embedded task, which needs none"
        official = load_text_task(task, args.data_dir, remedy=remedy)
    far = None if args.far_task_name is None else load_far(task, args.far_task_name, args.far_data_dir)
    chooses = "test" in official  # then the task's own validation rows do
    given, settings = (("validation",), {**args.settings, "validation_share": 0.0}) if chooses else ((), args.settings)

    def make(split: Split) -> dict[str, Any]:
        if not official:
            return {name: Dataset.from_list([vars(row) for row in rows]) for name, rows in embedded(split.seed).items()}
        train, share = official["train"], split.settings["validation_share"]
        train = train.select(range(len(train))[: split.settings["max_train_samples"]])
        parts = train.train_test_split(share, seed=split.seed) if share > 0 else {"train": train}
        validation = official["validation"] if chooses else parts.get("test", train.select([]))
        test = _grouped(official["test" if chooses else "validation"], "in-domain")
        sets = {"train": parts["train"], "validation": validation, "test": test}
        return {**sets, "shifted": _grouped(official["shifted"], "shifted")} if "shifted" in official else sets

    def with_files(sets: dict[str, Any]) -> dict[str, Any]:
        if file is not None:
            sets["validation"] = load_tsv(task, file)
            both = np.isin(hashes_of(sets["train"], task), hashes_of(sets["validation"], task))
            if both.any():
                say(f"{int(both.sum())} training rows are in `validation_file` and are held out.")
            sets["train"] = sets["train"].select(np.flatnonzero(~both))
        if len(sets["validation"]) == 0:
            raise ValueError(
                "The model was trained on all of train: `validation_file` must name rows that it has not seen."
            )
        if args.ood_data_file is not None:
            sets["shifted"] = _grouped(load_tsv(task, args.ood_data_file, labelled=None), "shifted")
        return sets if far is None else {**sets, "far": _grouped(far, "far")}

    called = {} if file is None else {"validation": f"rows of `validation_file` {file}"}
    noun = "Held-out rows" if official else "Sentences"
    sets, rows = hold_out(
        make, args, seed, history, RowKind(task.name, noun, lambda rows: hashes_of(rows, task), called),
        source=hashes_of(official["train"], task) if official else None,
        settings=settings, given=given if file is None else ("validation",), then=with_files,
    )  # fmt: skip
    return GlueData(task, **{"shifted": None, **sets}, rows=rows)


def check_far(task_name: str | None, far_task_name: str) -> None:
    """Refuse a far task that is the task itself, or that has fewer texts in a row than the task.

    Raises:
        ValueError: so.
    """
    task = EMBEDDED_TASK if task_name is None else TEXT_TASKS[task_name]
    columns = len(task.columns)
    if far_task_name == task_name:
        raise ValueError(f"`far_task_name` must be another task than `task_name`, got {far_task_name!r} for both.")
    if len(TEXT_TASKS[far_task_name].columns) < columns:
        able = ", ".join(name for name, of in TEXT_TASKS.items() if len(of.columns) >= columns and name != task_name)
        raise ValueError(
            f"`far_task_name` must have {columns} texts in a row, as {task.name} does, got {far_task_name!r}: {able}."
        )


def load_far(task: GlueTask, far_task_name: str, data_dir: str | None) -> Dataset:
    """Return the reported texts of another task, in the task's columns and without labels.

    Args:
        task: of the run.
        far_task_name: the other; of a pair of texts a task of single ones takes the first.
        data_dir: the folder of its official files; without one the hub's copy.
    """
    from datasets import Dataset

    splits = load_text_task(far_task_name, data_dir)
    rows, columns = splits["test" if "test" in splits else "validation"], TEXT_TASKS[far_task_name].columns
    return Dataset.from_dict({own: list(rows[far]) for own, far in zip(task.columns, columns, strict=False)})


def hashes_of(split: Dataset, task: GlueTask) -> Hashes:
    """Of each row's texts: a text that was trained on is that under any label."""
    columns = [split[name] for name in task.columns]
    return row_hashes("\x1f".join(map(str, texts)) for texts in zip(*columns, strict=True))


def _grouped(split: Dataset, group: str) -> Dataset:
    return split.add_column("group", [group] * len(split))
