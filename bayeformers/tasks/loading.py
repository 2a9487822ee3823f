"""Data sets of a task, from official files or from the Hugging Face hub. Needs the library ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .glue import GLUE_TASKS, GlueTask, TsvLayout, read_task, read_tsv
from .registry import TEXT_TASKS
from .text import TextTask, from_hub, mixed

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "nyu-mll/glue"


def load_hub(
    name: str, config: str | None = None, *, revision: str | None = None, what: str = "", remedy: str = ""
) -> Mapping[str, Any]:
    """Return the rows by split of a data set of the hub.

    Args:
        name: its name there.
        config: its configuration.
        revision: its branch, by default the main one.
        what: what to call it in an error; by default its name.
        remedy: what an error says to do without network.

    Raises:
        OSError: it cannot be loaded, for whatever reason.
    """
    import datasets

    try:
        where = {} if revision is None else {"revision": revision}
        splits: Mapping[str, Any] = datasets.load_dataset(name, config, **where)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each have their own kinds
        why = f"{type(error).__name__}: {error}" + (f"\n{remedy}" if remedy else "")
        raise OSError(f"{what or name} could not be loaded from the Hugging Face hub: {why}") from error
    return splits


def load_glue(task: GlueTask | str, data_dir: str | PathLike[str] | None = None, *, remedy: str = "") -> dict[str, Any]:
    """Return the labelled splits of a GLUE task, ``train``, ``validation`` and perhaps ``shifted``, as datasets.

    ``shifted`` is CoLA's out-of-domain file, whose rows are taken out of ``validation``, or MNLI's mismatched set.

    Args:
        task: a row of `GLUE_TASKS`, or its name.
        data_dir: a folder of the official TSV files, such as ``glue/CoLA``; without one the hub's copy is loaded.
        remedy: what the error of a hub that cannot be reached adds to its advice.

    Raises:
        FileNotFoundError: a file is missing.
    """
    from datasets import Dataset

    task = GLUE_TASKS[task] if isinstance(task, str) else task
    first, *others = task.tsv.validation
    if data_dir is None:
        files = f"the official files ({', '.join(task.tsv.files.values())})"
        advice = f"Without network, give --data_dir a folder of {files}{remedy}."
        hub = load_hub(HUB, task.name, what=f"{HUB} ({task.name})", remedy=advice)
        found = {name: hub[name].remove_columns("idx") for name in ("train", *task.tsv.validation)}
    else:
        found = {name: Dataset.from_dict(split) for name, split in read_task(task, data_dir).items()}
        if missing := {"train", *task.tsv.validation} - set(found):
            names = ", ".join(task.tsv.files[split] for split in sorted(missing))
            raise FileNotFoundError(f"`data_dir` {data_dir} lacks {names} of {task.name}.")
    splits = {"train": found["train"], "validation": found[first]}
    shifted = found.get("shifted") or (found[others[0]] if others else None)
    return splits if shifted is None else {**splits, "shifted": shifted}


def load_text_task(
    task: GlueTask | str, data_dir: str | PathLike[str] | None = None, *, remedy: str = ""
) -> dict[str, Any]:
    """Return the splits of any row of `TEXT_TASKS` as datasets: of GLUE's `load_glue`.

    Results are about ``test`` where there is one, whose ``validation`` is then for choices, else about ``validation``.
    ``shifted`` are inputs out of the training distribution, of CLINC150 those with none of its intents, unlabelled.
    Rows that the files sort by class are mixed, always in the same order: the first so many are of all classes.

    Args:
        task: the row, or its name.
        data_dir: the folder of the official files; without one the hub's copy is loaded.
        remedy: what the error of a hub that cannot be reached adds to its advice.
    """
    from datasets import Dataset

    task = TEXT_TASKS[task] if isinstance(task, str) else task
    if not isinstance(task, TextTask):
        return load_glue(task, data_dir, remedy=remedy)
    if data_dir is None:
        hub = task.hub
        advice = f"Without network, give --data_dir a folder of the official files ({task.files}){remedy}."
        what = f"{hub.name} ({task.name})"
        splits = from_hub(task, load_hub(hub.name, hub.config, revision=hub.revision, what=what, remedy=advice))
    else:
        splits = task.read(data_dir)
    splits = {name: mixed(split) for name, split in splits.items()} if task.is_sorted else splits
    return {name: Dataset.from_dict(split) for name, split in splits.items()}


def load_tsv(task: GlueTask, path: str | PathLike[str], *, labelled: bool | None = True) -> Dataset:
    """Return the rows of a file in the task's official layout, or with a header that has the task's (hub) columns.

    Args:
        task: whose texts and labels it holds.
        path: the file; where it is missing, or a row malformed, the error names it.
        labelled: whether it must have labels; None: where there are any.
    """
    from datasets import Dataset

    file = Path(path)
    first = file.open(encoding="utf-8-sig").readline().rstrip("\r\n").split("\t") if file.is_file() else []
    plain = TsvLayout(directory=task.tsv.directory, columns=task.columns, label="label")
    for layout in (plain, task.tsv):
        if layout.header is None and set(layout.columns) <= set(first):
            found = layout.label in first if labelled is None else labelled
            return Dataset.from_dict(read_tsv(replace(task, tsv=layout), path, labelled=found))
    return Dataset.from_dict(read_tsv(task, path))
