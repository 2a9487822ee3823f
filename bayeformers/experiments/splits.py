"""The sets of an experiment, split as the model that it starts from was, without rows that the model has seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .arguments import HoldOutArguments
from .command import say
from .rows import REMEDIES, Hashes, History, Split, TrainingRows, check_known, fingerprint, keep_unseen

Sets = dict[str, Any]
"""Rows by the name of their set: lists, or datasets that have ``select``."""
Make = Callable[[Split], Mapping[str, Any]]


@dataclass(frozen=True)
class RowKind:
    """What the rows of an experiment are, and what messages call them.

    Attributes:
        task: whose rows they are, for the record.
        noun: what messages call the rows.
        hashes: from rows to the hashes that identify them.
        called: what messages call the rows of a set.
        remedies: what an error about rows that were trained on advises.
    """

    task: str
    noun: str
    hashes: Callable[[Any], Hashes]
    called: Mapping[str, str] = field(default_factory=dict)
    remedies: str = REMEDIES


def hold_out(
    make: Make,
    args: HoldOutArguments,
    seed: int,
    history: History,
    kind: RowKind,
    *,
    source: Hashes | None = None,
    settings: Mapping[str, Any] | None = None,
    held_out: Sequence[str] = ("validation",),
    given: Collection[str] = (),
    then: Callable[[Sets], Sets] = lambda sets: sets,
) -> tuple[Sets, TrainingRows | None]:
    """Make the sets "train", "validation", "test" and others by the run's split, or by that of the model's record.

    Args:
        make: the sets of a split.
        args: the flags.
        seed: the run's, which counts without ``--split_seed``.
        history: what is known of the rows that the model which the run starts from was trained on.
        kind: of the rows.
        source: hashes of the rows that are split; None where ``make`` generates them from the seed.
        settings: what decides, with the seed, which rows are held out; by default shares and limits.
        held_out: the sets whose rows the model must not have seen.
        given: the sets that have a file of their own. Of those in ``held_out`` each of the others is drawn from the
            rows that train, so these must be known.
        then: what is done to the sets of the split, such as to take one of them from a file.

    Returns:
        The sets, no longer than the flags allow, and the record of a model that is trained on them: None where it
        cannot be known.

    Raises:
        ValueError: `split_seed` contradicts the record, or held-out rows were, or may have been, trained on.
    """
    if settings is None:
        settings = {name: getattr(args, name) for name in ("validation_share", "max_train_samples")}
    own = Split(seed if args.split_seed is None else args.split_seed, settings)
    history = replace(history, unknown="") if args.split_seed is not None else history
    if set(held_out) - set(given):
        check_known(history, kind.remedies)
    split, sets, origin = _split(make, own, history, kind.hashes, source)
    if args.split_seed is not None and split.seed != args.split_seed:
        raise ValueError(f"`split_seed` must be {split.seed}, by which the model was trained, got {args.split_seed}.")
    if (own.seed, dict(own.settings)) != (split.seed, dict(split.settings)):
        of = f" and {dict(split.settings)}" if split.settings else ""
        say(f"{kind.noun}: as the model's record says, by seed {split.seed}{of}.")
    sets = then(sets)
    train = kind.hashes(sets["train"])
    masks = {name: history.unseen(kind.hashes(sets[name]), train) for name in held_out}
    for name, kept in masks.items():
        if line := keep_unseen(kept, kind.called.get(name, f"{name} rows"), kind.remedies):
            say(line)
        if name in given and 2 * (twins := int(np.isin(kind.hashes(sets[name]), train).sum())) > len(kept):
            what = f"{twins} of the {len(kept)} {name} rows are among the training rows"
            raise ValueError(f"{what}: they hold nothing out.")
        sets[name] = _rows(sets[name], np.flatnonzero(kept).tolist())
    limits = {"train": args.max_train_samples}
    sets = {
        name: _rows(rows, range(len(rows))[: limits.get(name, args.max_eval_samples)]) for name, rows in sets.items()
    }
    return sets, history.after(kind.task, origin, split, train)


def _split(
    make: Make, own: Split, history: History, hashes: Callable[[Any], Hashes], source: Hashes | None
) -> tuple[Split, Sets, str]:
    """The split that counts, its sets, and the fingerprint of what was split."""
    if source is not None:
        origin = fingerprint(source)
        split = history.split(own, origin)
        return split, dict(make(split)), origin
    for split in (own if history.record is None else history.record.split, own):  # if it makes the record's rows
        sets = dict(make(split))
        origin = fingerprint(hashes(sets["train"]))
        if history.record is None or history.record.source == origin:
            break
    return split, sets, origin


def _rows(rows: Any, indices: Sequence[int]) -> Any:
    """Some of the rows; the same object where these are all."""
    if len(indices) == len(rows):
        return rows
    return [rows[i] for i in indices] if isinstance(rows, list) else rows.select(indices)
