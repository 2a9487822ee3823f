"""A WordPiece tokenizer and a tiny BERT with a span head, made on the spot for the written articles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from string import ascii_lowercase, digits

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast, RoFormerConfig, RoFormerForQuestionAnswering

MAX_LENGTH = 128
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_tokenizer(texts: Iterable[str], min_count: int = 12) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer: frequent words are one piece, all others are spelled letter by letter."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = (splitter.pre_tokenize_str(normalizer.normalize_str(text)) for text in texts)
    counts = Counter(word for found in words for word, _ in found)
    letters = ascii_lowercase + digits
    frequent = sorted(word for word, count in counts.items() if count >= min_count and word not in letters)
    pieces = (*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *frequent)
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def make_model(vocab_size: int) -> RoFormerForQuestionAnswering:
    """BERT with rotary positions, 3 layers of width 64: what stands next to what is learned once, not per position."""
    config = RoFormerConfig(
        vocab_size=vocab_size, embedding_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=MAX_LENGTH,
        initializer_range=0.125,  # 1 / sqrt(hidden_size): BERT's 0.02 suits 768
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return RoFormerForQuestionAnswering(config)
