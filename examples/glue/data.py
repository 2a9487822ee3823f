"""From a task's name to tokenised data sets: the embedded task, official TSV files, or the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from bayeformers.tasks import GLUE_TASKS, GlueTask, TsvLayout, read_task, read_tsv
from examples.glue.arguments import DataArguments
from examples.glue.grammar import FLIP_RATE, Example, generate

HUB = "nyu-mll/glue"
EMBEDDED_TASK = replace(GLUE_TASKS["cola"], name="embedded")


@dataclass(frozen=True)
class GlueData:
    """A task's data. Fitting and stopping see `train` and `validation` alone; `test` and `shifted` are only reported.

    ``test`` and ``shifted`` have a column ``group``. ``shifted`` is None where there are no such inputs, and has no
    column ``label`` where they are unlabelled. ``flip_rate`` is the share of flipped labels in the group "noisy".
    """

    task: GlueTask
    train: Dataset
    validation: Dataset
    test: Dataset
    shifted: Dataset | None
    flip_rate: float | None = None

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


def load_data(args: DataArguments, seed: int) -> GlueData:
    """The data that the arguments name.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files.
        OSError: the hub cannot be reached; the message says how to use local files.
    """
    if args.task_name is None:
        data = embedded_data(seed)
    else:
        task = GLUE_TASKS[args.task_name]
        data = split_data(task, official_data(task, args.data_dir) if args.data_dir else hub_data(task), args, seed)
    if args.ood_data_file is not None:
        data = replace(data, shifted=_grouped(ood_data(data.task, args.ood_data_file), "shifted"))
    return _limited(data, args)


def embedded_data(seed: int) -> GlueData:
    """The generated acceptability task: groups "clean", "noisy" and "shifted"."""
    splits = {name: _dataset(rows) for name, rows in generate(seed).items()}
    return GlueData(EMBEDDED_TASK, **splits, flip_rate=FLIP_RATE)


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


def split_data(task: GlueTask, splits: dict[str, Dataset], args: DataArguments, seed: int) -> GlueData:
    """Official splits as we use them: the validation set is held out of train, the official one is the test set.

    Where there are two official validation sets (MNLI), the second, of other genres, is the shifted set.
    """
    train = splits["train"]
    if args.max_train_samples is not None:
        train = train.select(range(min(args.max_train_samples, len(train))))
    held_out = train.train_test_split(args.validation_share, seed=seed)
    first, *others = [splits[name] for name in task.tsv.validation]
    shifted = splits.get("shifted") or (others[0] if others else None)
    return GlueData(
        task,
        train=held_out["train"],
        validation=held_out["test"],
        test=_grouped(first, "in-domain"),
        shifted=None if shifted is None else _grouped(shifted, "shifted"),
    )


def ood_data(task: GlueTask, path: str) -> Dataset:
    """A file of shifted inputs in the task's official layout, or with a header that has the task's (hub) columns."""
    file = Path(path)
    first = file.open(encoding="utf-8-sig").readline().rstrip("\r\n").split("\t") if file.is_file() else []
    plain = TsvLayout(directory=task.tsv.directory, columns=task.columns, label="label")
    for layout in (plain, task.tsv):
        if layout.header is None and set(layout.columns) <= set(first):
            labelled = layout.label in first
            return Dataset.from_dict(read_tsv(replace(task, tsv=layout), path, labelled=labelled))
    return Dataset.from_dict(read_tsv(task, path))


def _grouped(split: Dataset, group: str) -> Dataset:
    return split.add_column("group", [group] * len(split))


def _limited(data: GlueData, args: DataArguments) -> GlueData:
    def first(split: Dataset | None, limit: int | None) -> Dataset | None:
        return split if split is None or limit is None else split.select(range(min(limit, len(split))))

    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    limits |= {"test": args.max_eval_samples, "shifted": args.max_eval_samples}
    return replace(data, **{name: first(getattr(data, name), limit) for name, limit in limits.items()})
