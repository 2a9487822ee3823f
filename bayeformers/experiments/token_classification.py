"""Labelled sentences as an experiment sees them: what trains, what is held out of it, and what results are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..tasks.conll import Scheme, Sentence, detect_scheme, is_label, label_names, read_conll, to_iob2
from ..tasks.loading import load_hub
from .arguments import HoldOutArguments, flag
from .rows import FRESH, Hashes, History, Split, TrainingRows, row_hashes
from .splits import RowKind, hold_out

Labelled = dict[str, tuple[list[Sentence], Scheme]]
"""By set, its sentences and the scheme that they were written in."""


@dataclass
class ConllArguments(HoldOutArguments):
    """Which sentences, and from where."""

    train_file: str | None = flag(
        None, "CoNLL file: a word per line, its label in the last column. Left out: the generated set."
    )
    validation_file: str | None = flag(None, "CoNLL file; left out, a share of the training sentences is held out.")
    test_file: str | None = flag(None, "CoNLL file that the results are about.")
    shifted_file: str | None = flag(None, "CoNLL file of unfamiliar text, reported beside the test file.")
    dataset_name: str | None = flag(None, "Hub dataset with splits train, test and perhaps validation.")
    dataset_config_name: str | None = flag(None, "Configuration of that dataset.")
    text_column: str = flag("tokens", "The hub dataset's column of words.")
    label_column: str = flag("ner_tags", "The hub dataset's column of labels.")
    max_seq_length: int = flag(128, "Longer sentences are cut to so many pieces.")

    def __post_init__(self) -> None:
        """Refuse sources that exclude each other, and half of a pair of files."""
        super().__post_init__()
        files = (self.train_file, self.validation_file, self.test_file, self.shifted_file)
        if self.dataset_name is not None and any(files):
            raise ValueError(f"`dataset_name` {self.dataset_name!r} and CoNLL files exclude each other: give one.")
        if any(files) and (self.train_file is None or self.test_file is None):
            raise ValueError("`train_file` and `test_file` go together: CoNLL files need both.")

    @property
    def is_generated(self) -> bool:
        """Whether no data are named."""
        return self.train_file is None and self.dataset_name is None


@dataclass(frozen=True)
class ConllData:
    """Sentences in IOB2 to train on and to report on.

    Attributes:
        sets: "train" and "validation", which fit and choose; "test" and perhaps "shifted", which are only reported.
        schemes: by set, the scheme that its labels were written in; of files and hub data.
        rows: the record of a model that this run saves; None where it cannot be known.
    """

    sets: dict[str, list[Sentence]]
    schemes: dict[str, Scheme] = field(default_factory=dict)
    rows: TrainingRows | None = None

    @property
    def reported(self) -> dict[str, list[Sentence]]:
        """The sets that results are about."""
        return {name: self.sets[name] for name in ("test", "shifted") if name in self.sets}

    @property
    def labels(self) -> list[str]:
        """O and the B and I of every type that occurs anywhere."""
        return label_names(sentence.labels for sentences in self.sets.values() for sentence in sentences)


def load_conll_data(
    args: ConllArguments,
    seed: int,
    history: History = FRESH,
    *,
    generate: Callable[[int], Mapping[str, list[Sentence]]],
) -> ConllData:
    """Return the sets that the arguments name, split by ``seed``, or as the model that the run starts from was.

    Args:
        args: the arguments.
        seed: the run's.
        history: what is known of the rows which that model was trained on.
        generate: from a seed to the sentences of each set, where no data are named.

    Raises:
        ValueError: All labels are O. Missing or malformed files or columns, a hub that cannot be reached, and held-out
            sentences that the model has seen, or may have, are errors too.
    """
    labelled = {} if args.is_generated else _hub_sentences(args) if args.dataset_name else _file_sentences(args)
    named = {name: sentences for name, (sentences, _) in labelled.items()}

    def make(split: Split) -> Mapping[str, list[Sentence]]:
        if args.is_generated:
            return generate(split.seed)
        sets = {**named, "train": named["train"][: split.settings["max_train_samples"]]}
        if "validation" not in sets:
            order = np.random.default_rng(split.seed).permutation(len(sets["train"]))
            size = max(1, round(split.settings["validation_share"] * len(order)))
            for name, part in (("validation", order[:size]), ("rest", order[size:])):
                sets[name] = [sets["train"][i] for i in part]
            sets["train"] = sets.pop("rest")
        if "shifted" in sets:
            sets["shifted"] = [replace(sentence, group="shifted") for sentence in sets["shifted"]]
        return sets

    def hashes(sentences: list[Sentence]) -> Hashes:
        return row_hashes(" ".join(sentence.words) for sentence in sentences)

    sets, rows = hold_out(
        make, args, seed, history, RowKind("conll", "Sentences", hashes),
        source=hashes(named["train"]) if named else None,
        held_out=("validation", "test") if args.is_generated else ("validation",), given=named,
    )  # fmt: skip
    data = ConllData(sets, {name: scheme for name, (_, scheme) in labelled.items()}, rows)
    if len(data.labels) < 2:
        raise ValueError("Every label of the data is O: there is no entity to find.")
    return data


def _file_sentences(args: ConllArguments) -> Labelled:
    paths = {name: getattr(args, f"{name}_file") for name in ("train", "validation", "test", "shifted")}
    return {name: read_conll(path) for name, path in paths.items() if path is not None}


def _hub_sentences(args: ConllArguments) -> Labelled:
    name, what = str(args.dataset_name), f"`dataset_name` {args.dataset_name}"
    remedy = (
        "Without network, give --train_file and --test_file files in CoNLL format, or leave both out for the generated "
        "set, which needs none."
    )
    splits = load_hub(name, args.dataset_config_name, what=what, remedy=remedy)
    if missing := {"train", "test"} - set(splits):
        raise ValueError(f"{what} lacks the splits {sorted(missing)}: it has {[*splits]}.")
    columns = args.text_column, args.label_column
    return {name: read_columns(splits[name], *columns) for name in ("train", "validation", "test") if name in splits}


def read_columns(split: Any, text_column: str, label_column: str) -> tuple[list[Sentence], Scheme]:
    """The sentences of a hub dataset, and their scheme.

    Args:
        split: one split.
        text_column: its column of words.
        label_column: its column of labels: strings, or numbers whose names the dataset knows.

    Returns:
        The sentences that have a word, in IOB2, and the scheme that they were written in.

    Raises:
        ValueError: A column is missing, or a label is none.
    """
    for name in (text_column, label_column):
        if name not in split.column_names:
            raise ValueError(f"The dataset has no column {name!r}, only {split.column_names}: see --text_column.")
    names = getattr(getattr(split.features[label_column], "feature", None), "names", None)
    rows = [[names[tag] if names else str(tag) for tag in tags] for tags in split[label_column]]
    if wrong := {label for labels in rows for label in labels if not is_label(label)}:
        raise ValueError(f"`label_column` {label_column!r} must hold labels such as O and B-PER, got {wrong}.")
    pairs = zip(split[text_column], rows, strict=True)
    return [Sentence(tuple(words), tuple(to_iob2(tags))) for words, tags in pairs if words], detect_scheme(rows)
