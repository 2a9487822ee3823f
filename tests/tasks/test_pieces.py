"""Words as the pieces of a tokenizer, and back, exactly."""

import numpy as np
import pytest

from bayeformers.tasks import Sentence, at_words, encode_words
from bayeformers.tasks.pieces import IGNORED
from examples.data.tiny_bert import make_tokenizer

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_labels_stand_at_first_pieces() -> None:
    sentences = [Sentence(("Zoe", "saw", "Rio", "Bo"), ("B-PER", "O", "B-LOC", "I-LOC"))]
    tokenizer = make_tokenizer(["saw " * 20])
    (row,), first_pieces = encode_words(sentences, tokenizer, LABELS, max_length=32)
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "z", "##o", "##e", "saw", "r", "##i", "##o", "b", "##o", "[SEP]"]
    expected = [IGNORED] * len(pieces)
    for position, label in ((1, "B-PER"), (4, "O"), (5, "B-LOC"), (8, "I-LOC")):
        expected[position] = LABELS.index(label)
    assert row["labels"] == expected and first_pieces == [[1, 4, 5, 8]]


def test_words_that_are_cut_off_or_have_no_piece_are_known() -> None:
    sentences = [Sentence(("saw", "\u200b", "Rio", "Bo"), ("O", "O", "B-LOC", "I-LOC"))]
    tokenizer = make_tokenizer(["saw " * 20])
    (row,), first_pieces = encode_words(sentences, tokenizer, LABELS, max_length=6)  # [CLS] saw r ##i ##o [SEP]
    assert first_pieces == [[1, -1, 2, -1]]
    assert [label for label in row["labels"] if label != IGNORED] == [0, 1]


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="must have a fast tokenizer"):
        encode_words([], Slow(), LABELS, 8)  # type: ignore[arg-type]


def test_words_without_a_piece_are_outside_for_certain() -> None:
    pieces = np.log(np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 5))).astype(np.float32)
    words = at_words(pieces, [1, -1, 3])
    np.testing.assert_array_equal(words[:, [0, 2]], pieces[:, [1, 3]])
    np.testing.assert_allclose(np.exp(words[:, 1]), [[1, 0, 0, 0, 0]] * 2, atol=1e-20)
