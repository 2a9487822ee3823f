"""The sets of an experiment, split as the model that it starts from was, without rows that the model has seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from .arguments import HoldOutArguments
from .rows import (
    Hashes,
    History,
    Split,
    TrainingRows,
    check_known,
    check_split_seed,
    fingerprint,
    row_hashes,
    say_split,
    unseen_sets,
)

Row = TypeVar("Row")


def hold_out(
    make: Callable[[Split], Mapping[str, list[Row]]],
    args: HoldOutArguments,
    seed: int,
    history: History,
    *,
    task: str,
    noun: str,
    text_of: Callable[[Row], str],
    source: Sequence[Row] | None = None,
    settings: Sequence[str] = ("validation_share", "max_train_samples"),
    held_out: Sequence[str] = ("validation",),
    given: Collection[str] = (),
) -> tuple[dict[str, list[Row]], TrainingRows | None]:
    """Make the sets "train", "validation", "test" and others by the run's split, or by that of the model's record.

    Args:
        make: the sets of a split.
        args: the flags.
        seed: the run's, which counts without ``--split_seed``.
        history: what is known of the rows that the model which the run starts from was trained on.
        task: whose rows they are, for the record.
        noun: what messages call the rows.
        text_of: what identifies a row.
        source: the rows that are split; None where ``make`` generates them from the seed.
        settings: the flags that decide, with the seed, which rows are held out.
        held_out: the sets whose rows the model must not have seen.
        given: the sets that have a file of their own. Of those in ``held_out`` each of the others is drawn from the
            rows that train, so these must be known.

    Returns:
        The sets, no longer than the flags allow, and the record of a model that is trained on them: None where it
        cannot be known.
    """

    def hashes(rows: Sequence[Row]) -> Hashes:
        return row_hashes(text_of(row) for row in rows)

    own = Split(seed if args.split_seed is None else args.split_seed, {name: getattr(args, name) for name in settings})
    history = replace(history, unknown="") if args.split_seed is not None else history
    if set(held_out) - set(given):
        check_known(history)
    if source is not None:
        origin = fingerprint(hashes(source))
        split = history.split(own, origin)
        sets = dict(make(split))
    else:  # the record's seed, if it makes the rows that the record is of
        for split in (own if history.record is None else history.record.split, own):
            sets = dict(make(split))
            origin = fingerprint(hashes(sets["train"]))
            if history.record is None or history.record.source == origin:
                break
    check_split_seed(args.split_seed, split)
    say_split(noun, own, split)
    train = hashes(sets["train"])
    for name, kept in unseen_sets(history, train, {name: hashes(sets[name]) for name in held_out}, given=given).items():
        sets[name] = [sets[name][i] for i in kept]
    limits = {"train": args.max_train_samples}
    sets = {name: rows[: limits.get(name, args.max_eval_samples)] for name, rows in sets.items()}
    return sets, history.after(task, origin, split, train)
