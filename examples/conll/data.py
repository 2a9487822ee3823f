"""From files, the hub or the generator to sentences, and from sentences to a tokenizer's pieces and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from examples.conll import newswire
from examples.conll.arguments import TokenDataArguments
from examples.conll.entities import Scheme, detect_scheme, is_label, label_names, to_iob2
from examples.conll.reader import Sentence, read_conll
from examples.held_out import (
    FRESH,
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

IGNORED = -100


@dataclass(frozen=True)
class TokenData:
    """Sentences in IOB2. Fitting and stopping see `train` and `validation`; `test` and `shifted` are only reported.

    Attributes:
        schemes: set -> the scheme that its labels were written in.
        person_share: of the generated set, the probability that an ambiguous name is a person.
        rows: the record of a model that this run saves; None where it cannot be known.
    """

    train: list[Sentence]
    validation: list[Sentence]
    test: list[Sentence]
    shifted: list[Sentence] = field(default_factory=list)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    person_share: float | None = None
    rows: TrainingRows | None = None

    @property
    def reported(self) -> dict[str, list[Sentence]]:
        """The sets that results are about."""
        return {"test": self.test, **({"shifted": self.shifted} if self.shifted else {})}

    @property
    def labels(self) -> list[str]:
        """O and the B and I of every type that occurs anywhere."""
        return label_names(
            one.labels for part in (self.train, self.validation, *self.reported.values()) for one in part
        )


def load_data(args: TokenDataArguments, seed: int, history: History = FRESH) -> TokenData:
    """The data that the arguments name, split by `seed`, or as the model that the run starts from was.

    Raises:
        FileNotFoundError, ValueError: missing or malformed files or columns; held-out sentences that the model has
            seen, or may have.
        OSError: the hub cannot be reached; the message says how to use local files.
    """
    settings = {name: getattr(args, name) for name in ("validation_share", "max_train_samples")}
    own = Split(seed if args.split_seed is None else args.split_seed, settings)
    history = replace(history, unknown="") if args.split_seed is not None else history
    data, source, split = (generated if args.is_embedded else split_sentences)(args, own, history)
    if len(data.labels) < 2:
        raise ValueError("Every label of the data is O: there is no entity to find.")
    check_split_seed(args.split_seed, split)
    say_split("Sentences", own, split)
    train = hashes_of(data.train)
    names = ("validation", "test") if args.is_embedded else ("validation",)
    hashes = {name: hashes_of(getattr(data, name)) for name in names}
    kept = unseen_sets(history, train, hashes, given=["validation"] if args.validation_file else [])
    data = replace(data, **{name: [getattr(data, name)[i] for i in rows] for name, rows in kept.items()})
    return replace(_limited(data, args), rows=history.after("conll", source, split, train))


def hashes_of(sentences: Sequence[Sentence]) -> Hashes:
    """Of each sentence's words."""
    return row_hashes(" ".join(one.words) for one in sentences)


Found = tuple[TokenData, str, Split]
"""The sets, the fingerprint of what they were split from, and how."""


def generated(args: TokenDataArguments, own: Split, history: History) -> Found:
    """The generated set, of the record's seed if it is of that set."""
    check_known(history)
    for split in (own if history.record is None else history.record.split, own):
        data = TokenData(**newswire.generate(split.seed), person_share=newswire.PERSON_SHARE)
        source = fingerprint(hashes_of(data.train))
        if history.record is None or history.record.source == source:
            break
    return data, source, split


def split_sentences(args: TokenDataArguments, own: Split, history: History) -> Found:
    """Sentences of files or the hub; without validation data some are held out of train."""
    found = hub_sentences(args) if args.dataset_name else file_sentences(args)
    splits = {name: sentences for name, (sentences, _) in found.items()}
    source = fingerprint(hashes_of(splits["train"]))
    split = history.split(own, source)
    splits["train"] = splits["train"][: split.settings["max_train_samples"]]  # before some are held out of them
    if "validation" not in splits:
        check_known(history)
        splits |= _held_out(splits["train"], split.settings["validation_share"], split.seed)
    splits["shifted"] = [replace(one, group="shifted") for one in splits.get("shifted", [])]
    return TokenData(**splits, schemes={name: scheme for name, (_, scheme) in found.items()}), source, split


def file_sentences(args: TokenDataArguments) -> dict[str, tuple[list[Sentence], Scheme]]:
    """Set -> the sentences of its CoNLL file and their scheme."""
    names = ("train", "validation", "test", "shifted")
    paths = {name: getattr(args, f"{name}_file") for name in names}
    return {name: read_conll(path) for name, path in paths.items() if path is not None}


def hub_sentences(args: TokenDataArguments) -> dict[str, tuple[list[Sentence], Scheme]]:
    """The splits of a hub dataset; its labels are strings, or numbers whose names the dataset knows."""
    try:
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    except Exception as error:  # datasets, huggingface_hub and the HTTP client each have their own kinds
        raise OSError(
            f"`dataset_name` {args.dataset_name} could not be loaded from the Hugging Face hub: "
            f"{type(error).__name__}: {error}\nWithout network, give --train_file and --test_file files in CoNLL "
            "format, or leave both out for the generated set, which needs none."
        ) from error
    if missing := {"train", "test"} - set(splits):
        raise ValueError(f"`dataset_name` {args.dataset_name} lacks the splits {sorted(missing)}: it has {[*splits]}.")
    return {name: from_dataset(splits[name], args) for name in ("train", "validation", "test") if name in splits}


def from_dataset(split: Dataset, args: TokenDataArguments) -> tuple[list[Sentence], Scheme]:
    """The sentences of a dataset with a column of words and one of labels.

    Raises:
        ValueError: a column is missing, or a label is none.
    """
    for name in (args.text_column, args.label_column):
        if name not in split.column_names:
            raise ValueError(f"The dataset has no column {name!r}, only {split.column_names}: see --text_column.")
    feature = getattr(split.features[args.label_column], "feature", None)
    names = getattr(feature, "names", None)
    rows = [[names[tag] if names else str(tag) for tag in tags] for tags in split[args.label_column]]
    if wrong := {label for labels in rows for label in labels if not is_label(label)}:
        raise ValueError(f"`label_column` {args.label_column!r} must hold labels such as O and B-PER, got {wrong}.")
    scheme = detect_scheme(rows)
    words = split[args.text_column]
    return [Sentence(tuple(one), tuple(to_iob2(tags))) for one, tags in zip(words, rows, strict=True) if one], scheme


def _held_out(train: list[Sentence], share: float, seed: int) -> dict[str, list[Sentence]]:
    order = np.random.default_rng(seed).permutation(len(train))
    size = max(1, round(share * len(train)))
    return {"validation": [train[i] for i in order[:size]], "train": [train[i] for i in order[size:]]}


def _limited(data: TokenData, args: TokenDataArguments) -> TokenData:
    few = args.max_eval_samples
    parts = {name: getattr(data, name)[:few] for name in ("validation", "test", "shifted")}
    return replace(data, train=data.train[: args.max_train_samples], **parts)


# -- pieces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A set as the model sees it.

    Attributes:
        dataset: columns ``input_ids``, ``attention_mask``, ``labels``, ...: a label stands at the first piece of its
            word, -100 at the others and at special tokens.
        first_pieces: of each sentence, the position of each word's first piece; -1 where a word has none, because the
            sentence was cut before it or the tokenizer knows none of its characters.
    """

    dataset: Dataset
    first_pieces: list[list[int]]

    def first(self, size: int) -> Encoded:
        """The first ``size`` sentences."""
        size = min(size, len(self.first_pieces))
        return Encoded(self.dataset.select(range(size)), self.first_pieces[:size])


def encode(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> Encoded:
    """Tokenise sentences and align their labels.

    Raises:
        ValueError: the tokenizer cannot say which word a piece belongs to.
    """
    if not tokenizer.is_fast:
        raise ValueError("`model_name_or_path` must have a fast tokenizer, which knows the word of each piece.")
    numbers = {label: index for index, label in enumerate(labels)}
    rows: list[dict[str, Any]] = []
    places: list[list[int]] = []
    for one in sentences:
        found = tokenizer(list(one.words), is_split_into_words=True, truncation=True, max_length=max_length)
        first = first_piece_positions(found.word_ids(0), len(one.words))
        aligned = [IGNORED] * len(found["input_ids"])
        for label, position in zip(one.labels, first, strict=True):
            if position >= 0:
                aligned[position] = numbers[label]
        rows.append({**found, "labels": aligned})
        places.append(first)
    return Encoded(Dataset.from_list(rows), places)


def first_piece_positions(word_ids: Sequence[int | None], num_words: int) -> list[int]:
    """Where each word's first piece stands, or -1.

    >>> first_piece_positions([None, 0, 0, 2, None], 4)
    [1, -1, 3, -1]
    """
    first = [-1] * num_words
    for position, word in enumerate(word_ids):
        if word is not None and first[word] < 0:
            first[word] = position
    return first
