"""Which rows a model was trained on, recorded beside it: what later runs fit to held-out rows must not see them.

A temperature, delta or prior precision that is fitted to rows of the training makes a model look as sure of new rows as
it is of those it knows by heart. So every model that an example saves carries `training_rows.json`: the split that it
was trained with, and a hash of each row. A run that starts from such a model splits as it was split, whatever its own
`--seed`, and checks.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .saved import DETERMINISTIC, saved_models

FILE = "training_rows.json"
VERSION = 1
Hashes = NDArray[np.uint64]


def row_hashes(rows: Iterable[str | bytes]) -> Hashes:
    """A hash of each row's content, (N,); white space in text does not count."""
    found = (row if isinstance(row, bytes) else " ".join(row.split()).encode() for row in rows)
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in found)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def fingerprint(hashes: Hashes) -> str:
    """Of a set of rows, in whatever order."""
    return hashlib.sha256(np.sort(hashes).astype("<u8").tobytes()).hexdigest()[:32]


@dataclass(frozen=True)
class Split:
    """What decides which rows are held out of a source: a seed, and the shares and limits of the flags."""

    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """What a model was trained on.

    Attributes:
        task: whose rows they are.
        source: fingerprint of the rows that were split.
        split: how.
        train: fingerprint of the rows that were trained on.
        seen: sorted hashes of these and of all rows that the model it started from was trained on.
    """

    task: str
    source: str
    split: Split
    train: str
    seen: Hashes

    def save(self, folder: str | Path) -> None:
        """Write the record beside a model."""
        content = {
            "version": VERSION,
            "about": "Rows this model was trained on; examples check by them that held-out rows are held out.",
            **{"task": self.task, "source": self.source, "seed": self.split.seed},
            **{"settings": dict(self.split.settings), "train": self.train, "num_seen": len(self.seen)},
            "seen": base64.b64encode(self.seen.astype("<u8").tobytes()).decode(),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRows | None:
        """The record in a model's folder, None if there is none; one that is damaged or newer is refused."""
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            seen = np.frombuffer(base64.b64decode(found["seen"], validate=True), dtype="<u8").astype(np.uint64)
            split = Split(int(found["seed"]), found["settings"])
            record = cls(found["task"], found["source"], split, found["train"], seen)
            version, count = int(found["version"]), int(found["num_seen"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}.") from None
        if version > VERSION or count != len(seen):
            what = f"version {version}, {len(seen)} of {count} rows"
            raise ValueError(f"{path} is damaged or of a newer version: {what}.")
        return record


@dataclass(frozen=True)
class History:
    """What is known of the rows that the model which a run starts from was trained on.

    Attributes:
        record: the model's; None of a model that no rows of a task have trained.
        unknown: the flag and value that named a model without a record, where that is no answer; else empty.
    """

    record: TrainingRows | None = None
    unknown: str = ""

    def split(self, own: Split, source: str) -> Split:
        """The recorded split where the record is of the same source, else the run's own."""
        return self.record.split if self.record is not None and self.record.source == source else own

    def unseen(self, hashes: Hashes, train: Hashes) -> NDArray[np.bool_]:
        """Which held-out rows, (N,), the model has not seen; ``train``: those it is trained on, split likewise."""
        # the recorded split's own held-out rows pass as they are: a row may have a twin that was trained on
        if self.record is None or self.record.train == fingerprint(train):
            return np.ones(len(hashes), dtype=bool)
        return ~np.isin(hashes, self.record.seen)

    def after(self, task: str, source: str, split: Split, train: Hashes) -> TrainingRows | None:
        """Return the record of a model that this run saves; None where its rows are not known.

        Args:
            task: whose rows they are.
            source: fingerprint of the rows that were split.
            split: how they were split.
            train: hashes of the rows that this run trains on, (N,).
        """
        if self.unknown:
            return None
        before = np.empty(0, dtype=np.uint64) if self.record is None else self.record.seen
        return TrainingRows(task, source, split, fingerprint(train), np.union1d(before, train))


FRESH = History()
"""Of a model that the run makes itself, or of a pretrained one."""

SPLIT_AGAIN = "--split_seed, the --seed of the run that trained it (with that run's shares and --max_train_samples)"
REMEDIES = f"Give --validation_file, rows that the model has not seen, or {SPLIT_AGAIN}."


def history_of(flag: str, folders: Sequence[str | Path], *, must_know: bool) -> History:
    """Return the history of saved models; without a record it is unknown, or fresh where nothing depends on it.

    Args:
        flag: what named them, for messages.
        folders: the models' folders, or a hub name.
        must_know: whether the run fits anything around the models' own weights.

    Raises:
        ValueError: records that differ.
    """
    records = {str(folder): TrainingRows.load(folder) for folder in folders}
    known = {name: record for name, record in records.items() if record is not None}
    if len({(record.source, record.train) for record in known.values()}) > 1:
        raise ValueError(
            f"`{flag}`: {' and '.join(known)} were trained on different rows, so no row is held out for all: "
            "name one of them."
        )
    if len(known) < len(records):
        missing = next(name for name, record in records.items() if record is None)
        return History(unknown=f"`{flag}` {missing}") if must_know else FRESH
    return History(next(iter(known.values()), None))


def past_of(
    name_or_path: str | None, *, trains: bool, eval_only: str | None = None, generated: bool = False
) -> History:
    """Return what is known of the rows that the models which a run starts from were trained on.

    Args:
        name_or_path: the model that is named; None where the run makes its own.
        trains: whether that model is trained further before anything is fitted to held-out rows.
        eval_only: the folder of an earlier run whose models are evaluated instead. A posterior alone has nothing fitted
            to held-out rows any more.
        generated: whether the data are generated from a seed, so that their test rows depend on it too.
    """
    if eval_only is not None:
        saved = saved_models(eval_only)
        return history_of("eval_only", list(saved.values()), must_know=DETERMINISTIC in saved or generated)
    return FRESH if name_or_path is None else history_of("model_name_or_path", [name_or_path], must_know=not trains)


def check_known(history: History, remedies: str = REMEDIES) -> None:
    """Raise ValueError where rows are to be held out for a model whose training rows are not known."""
    if history.unknown:
        raise ValueError(
            f"{history.unknown} has no record ({FILE}) of the rows it was trained on: rows that are held out of train "
            "now may be among them, and what is fitted to them (temperature, delta, prior precision) would be wrong. "
            f"{remedies}"
        )


def keep_unseen(kept: NDArray[np.bool_], what: str, remedies: str = REMEDIES) -> str:
    """Return a line to say about a held-out set, empty where all rows are kept.

    Args:
        kept: which of its rows the model has not seen, (N,).
        what: the set's name in messages.
        remedies: advice that ends the error's message.

    Raises:
        ValueError: most of the rows were trained on, or fewer than two are kept.
    """
    seen, total = int((~kept).sum()), len(kept)
    if seen == 0:
        return ""
    if 2 * seen > total or total - seen < 2:
        raise ValueError(f"{seen} of the {total} {what} were trained on, as the model's {FILE} says. {remedies}")
    return f"{seen} of the {total} {what} were trained on and are left out."


class RecordRows(TrainerCallback):
    """Writes the record into every checkpoint of a training."""

    def __init__(self, record: TrainingRows | None) -> None:
        self.record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write it beside the checkpoint that was just written.

        Args:
            args: of the training, for its output folder.
            state: the step of the checkpoint, and the process.
            control: what the training does next; it stays as it is.
            **kwargs: what else a callback is given, such as the model.
        """
        if self.record is not None and state.is_world_process_zero:
            self.record.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
