"""From a task's name to tokenised data sets: the embedded task, official TSV files, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from bayeformers.tasks import GLUE_TASKS, GlueTask, TsvLayout, read_task, read_tsv
from examples.glue.arguments import DataArguments
from examples.glue.grammar import FLIP_RATE, Example, generate
from examples.held_out import (
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
from examples.running import say

HUB = "nyu-mll/glue"
EMBEDDED_TASK = replace(GLUE_TASKS["cola"], name="embedded")


@dataclass(frozen=True)
class GlueData:
    """A task's data. Fitting and stopping see `train` and `validation` alone; `test` and `shifted` are only reported.

    ``test`` and ``shifted`` have a column ``group``. ``shifted`` is None where there are no such inputs, and has no
    column ``label`` where they are unlabelled. ``flip_rate`` is the share of flipped labels in the group "noisy".
    ``rows``: the record of a model that this run saves; None where it cannot be known.
    """

    task: GlueTask
    train: Dataset
    validation: Dataset
    test: Dataset
    shifted: Dataset | None
    flip_rate: float | None = None
    rows: TrainingRows | None = None

    @property
    def reported(self) -> dict[str, Dataset]:
        """The sets that results are about."""
        return {"test": self.test, **({} if self.shifted is None else {"shifted": self.shifted})}

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> GlueData:
        """The same data with the tokenizer's columns added."""

        def tokenize(batch: dict[str, list[Any]]) -> Any:
            return tokenizer(*(batch[name] for name in self.task.columns), truncation=True, max_length=max_length)

        def add(split: Dataset | None) -> Dataset | None:
            return None if split is None else split.map(tokenize, batched=True, desc="tokenizing")

        names = ("train", "validation", "test", "shifted")
        return replace(self, **{name: add(getattr(self, name)) for name in names})


def load_data(args: DataArguments, seed: int, history: History = FRESH) -> GlueData:
    """The data that the arguments name, split by `seed`, or as the model that the run starts from was.

    Args:
        args: the arguments.
        seed: the run's.
        history: what is known of the rows which that model was trained on.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files; held-out rows that the model has seen, or may have.
        OSError: the hub cannot be reached; the message says how to use local files.
    """
    own = Split(seed if args.split_seed is None else args.split_seed, _settings(args))
    history = replace(history, unknown="") if args.split_seed is not None else history
    if args.validation_file is None:
        check_known(history)
    data, source, split = (embedded_data if args.task_name is None else task_data)(args, own, history)
    check_split_seed(args.split_seed, split)
    if args.validation_file is not None:
        data = _with_validation(data, labelled_file(data.task, args.validation_file))
    data = _unseen_validation(data, args, history)
    rows = history.after(data.task.name, source, split, hashes_of(data.train, data.task))
    if args.ood_data_file is not None:
        shifted = _grouped(labelled_file(data.task, args.ood_data_file, labelled=None), "shifted")
        data = replace(data, shifted=shifted)
    return replace(_limited(data, args), rows=rows)


def _settings(args: DataArguments) -> dict[str, Any]:
    """What decides, with the seed, which rows are held out."""
    share = 0.0 if args.validation_file is not None else args.validation_share
    return {"validation_share": share, "max_train_samples": args.max_train_samples}


def hashes_of(split: Dataset, task: GlueTask) -> Hashes:
    """Of each row's texts: a text that was trained on is that under any label."""
    columns = [split[name] for name in task.columns]
    return row_hashes("\x1f".join(map(str, texts)) for texts in zip(*columns, strict=True))


def _with_validation(data: GlueData, validation: Dataset) -> GlueData:
    """Other validation rows, which are held out of train if they are in it."""
    both = np.isin(hashes_of(data.train, data.task), hashes_of(validation, data.task))
    if both.any():
        say(f"{int(both.sum())} training rows are in `validation_file` and are held out.")
    return replace(data, validation=validation, train=data.train.select(np.flatnonzero(~both)))


def _unseen_validation(data: GlueData, args: DataArguments, history: History) -> GlueData:
    """Without validation rows that the model was trained on.

    Raises:
        ValueError: too few are left, or there never were any.
    """
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


Found = tuple[GlueData, str, Split]
"""The sets, the fingerprint of what they were split from, and how."""


def embedded_data(args: DataArguments, own: Split, history: History) -> Found:
    """The generated acceptability task: groups "clean", "noisy" and "shifted".

    Raises:
        ValueError: the record is of sentences that this version does not generate.
    """
    record = history.record if history.record is not None and history.record.task == EMBEDDED_TASK.name else None
    split = own if record is None else record.split
    splits = {name: _dataset(rows) for name, rows in generate(split.seed).items()}
    source = fingerprint(hashes_of(splits["train"], EMBEDDED_TASK))
    if record is not None and record.source != source:
        raise ValueError(f"The model was trained on other sentences of seed {split.seed} than this version generates.")
    say_split("Sentences", Split(own.seed), Split(split.seed))
    return GlueData(EMBEDDED_TASK, **splits, flip_rate=FLIP_RATE), source, split


def task_data(args: DataArguments, own: Split, history: History) -> Found:
    """An official task, its validation set held out of train."""
    task = GLUE_TASKS[str(args.task_name)]
    splits = official_data(task, args.data_dir) if args.data_dir else hub_data(task)
    source = fingerprint(hashes_of(splits["train"], task))
    split = history.split(own, source)
    if args.validation_file is None:
        say_split("Held-out rows", own, split)
    return split_data(task, splits, split), source, split


def _dataset(rows: list[Example]) -> Dataset:
    return Dataset.from_list([vars(row) for row in rows])


def official_data(task: GlueTask, directory: str) -> dict[str, Dataset]:
    """Every labelled split in a folder of official TSV files."""
    splits = read_task(task, directory)
    if missing := {"train", *task.tsv.validation} - set(splits):
        names = ", ".join(task.tsv.files[split] for split in sorted(missing))
        raise FileNotFoundError(f"`data_dir` {directory} lacks {names} of {task.name}.")
    return {name: Dataset.from_dict(split) for name, split in splits.items()}


def hub_data(task: GlueTask) -> dict[str, Dataset]:
    """The labelled splits of the hub's copy."""
    try:
        splits = load_dataset(HUB, task.name)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each have their own kinds
        raise OSError(
            f"{HUB} ({task.name}) could not be loaded from the Hugging Face hub: {type(error).__name__}: {error}\n"
            f"Without network, give --data_dir a folder of the official files ({', '.join(task.tsv.files.values())}), "
            "or leave out --task_name for the embedded task, which needs none."
        ) from error
    return {name: splits[name].remove_columns("idx") for name in ("train", *task.tsv.validation)}


def split_data(task: GlueTask, splits: Mapping[str, Dataset], split: Split) -> GlueData:
    """Official splits as we use them: the validation set is held out of train, the official one is the test set.

    Where there are two official validation sets (MNLI), the second, of other genres, is the shifted set. Without a
    share nothing is held out of train.
    """
    train, limit, share = splits["train"], split.settings["max_train_samples"], split.settings["validation_share"]
    if limit is not None:
        train = train.select(range(min(limit, len(train))))
    held_out = {"train": train, "test": train.select([])}
    if share > 0:
        held_out = train.train_test_split(share, seed=split.seed)
    first, *others = [splits[name] for name in task.tsv.validation]
    shifted = splits.get("shifted") or (others[0] if others else None)
    return GlueData(
        task,
        train=held_out["train"],
        validation=held_out["test"],
        test=_grouped(first, "in-domain"),
        shifted=None if shifted is None else _grouped(shifted, "shifted"),
    )


def labelled_file(task: GlueTask, path: str, *, labelled: bool | None = True) -> Dataset:
    """A file in the task's official layout, or with a header that has the task's (hub) columns.

    ``labelled``: whether it must have labels; None: where there are any.
    """
    file = Path(path)
    first = file.open(encoding="utf-8-sig").readline().rstrip("\r\n").split("\t") if file.is_file() else []
    plain = TsvLayout(directory=task.tsv.directory, columns=task.columns, label="label")
    for layout in (plain, task.tsv):
        if layout.header is None and set(layout.columns) <= set(first):
            found = layout.label in first if labelled is None else labelled
            return Dataset.from_dict(read_tsv(replace(task, tsv=layout), path, labelled=found))
    return Dataset.from_dict(read_tsv(task, path))


def _grouped(split: Dataset, group: str) -> Dataset:
    return split.add_column("group", [group] * len(split))


def _limited(data: GlueData, args: DataArguments) -> GlueData:
    def first(split: Dataset | None, limit: int | None) -> Dataset | None:
        return split if split is None or limit is None else split.select(range(min(limit, len(split))))

    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    limits |= {"test": args.max_eval_samples, "shifted": args.max_eval_samples}
    return replace(data, **{name: first(getattr(data, name), limit) for name, limit in limits.items()})
