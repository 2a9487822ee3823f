"""A WordPiece tokenizer and a tiny BERT made on the spot, for a task whose words no pretrained model is needed for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from string import ascii_lowercase
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bayeformers.experiments import GlueData

MAX_LENGTH = 96
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer(sentences: Iterable[str], min_count: int = 12) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer: frequent words are one piece, all others are spelled letter by letter.

    Spelling as in ``newt -> n ##e ##w ##t``: an unseen word is made of pieces that rare training words are made of,
    and `[UNK]` occurs for nothing that is written in the letters a-z.
    """
    counts = Counter(word for sentence in sentences for word in sentence.lower().split())
    frequent = {word for word, count in counts.items() if count >= min_count and len(word) > 1}
    words = sorted(word for word in frequent if word.removesuffix("s") not in frequent - {word})
    pieces = (*_SPECIAL, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase), *words)
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def make_model(vocab_size: int, num_labels: int = 2) -> BertForSequenceClassification:
    """BERT with 2 layers of width 96: it learns agreement over a distance in half a minute of CPU time."""
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        initializer_range=0.1,  # 1 / sqrt(hidden_size): BERT's 0.02 suits 768
        max_position_embeddings=MAX_LENGTH, num_labels=num_labels, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config)


def load_classifier(path: str | None, data: GlueData) -> tuple[Any, Any]:
    """Tokenizer and classifier for a task: pretrained, or without a path tiny ones that know the training words."""
    task = data.task
    if path is None:
        tokenizer: Any = make_tokenizer(text for name in task.columns for text in data.train[name])
        model: Any = make_model(len(tokenizer), task.num_labels)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
        options = {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}  # the head of another task
        model = AutoModelForSequenceClassification.from_pretrained(path, **options)
    task.configure(model.config)
    return tokenizer, model
