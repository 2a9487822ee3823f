"""Words as the pieces of a tokenizer, and from what a model says of pieces back to words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .conll import Sentence

IGNORED = -100
CERTAIN = -60.0
"""Log-probability of what cannot be: of the other labels of a word without a piece, which counts as O."""


def encode_words(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return the model's inputs, a row for each sentence, and for each sentence where each word's first piece stands.

    ``labels`` of a row are numbers at the first pieces of words, -100 at the others and at special tokens. The place is
    -1 where a word has none: the sentence was cut before it, or the tokenizer knows none of its characters.

    Args:
        sentences: words and labels.
        tokenizer: a fast one.
        labels: the names of the C labels, O first.
        max_length: pieces of the longest sentence; what is longer is cut.

    Raises:
        ValueError: The tokenizer cannot say which word a piece belongs to.
    """
    if not tokenizer.is_fast:
        raise ValueError("`model_name_or_path` must have a fast tokenizer, which knows the word of each piece.")
    rows: list[dict[str, Any]] = []
    first_pieces: list[list[int]] = []
    for sentence in sentences:
        pieces: Any = tokenizer(list(sentence.words), is_split_into_words=True, truncation=True, max_length=max_length)
        word_of = pieces.word_ids(0)
        first = [word_of.index(word) if word in word_of else -1 for word in range(len(sentence.words))]
        aligned = [IGNORED] * len(word_of)
        for label, position in zip(sentence.labels, first, strict=True):
            if position >= 0:
                aligned[position] = labels.index(label)
        rows.append({**pieces, "labels": aligned})
        first_pieces.append(first)
    return rows, first_pieces


def at_words(log_probs: NDArray[Any], first_pieces: Sequence[int]) -> NDArray[Any]:
    """Log-probabilities at pieces (S, T, C) as those of words (S, n, C); a word without a piece is O for certain."""
    positions = np.asarray(first_pieces)
    words = log_probs[:, positions.clip(0)]
    words[:, positions < 0] = CERTAIN
    words[:, positions < 0, 0] = 0.0
    return words
