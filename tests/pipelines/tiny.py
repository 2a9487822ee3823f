"""Tiny models, and tokenizers of a few words, for pipelines."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn

from bayeformers.guarantees import AbstentionPolicy

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "a",
    "mat",
    "ber",
    "##lin",
    "john",
    "smi",
    "##th",
    "in",
    "good",
    "bad",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
TEXTS = ["the cat sat on a mat .", "john ran", "a good dog in berlin ran on the mat", "bad"]


def tokenizer(max_length: int = 32) -> hf.PreTrainedTokenizerFast:
    """Of word pieces, as BERT's."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bert(kind: str = "SequenceClassification", labels: list[str] | None = None, **options: Any) -> Any:
    """A BERT with a head, the same at every call, away from even probabilities."""
    names = labels or ["A", "B", "C"]
    config = hf.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)}, **options,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(hf, f"BertFor{kind}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def policy(kind: type[AbstentionPolicy] = AbstentionPolicy, **fields: Any) -> AbstentionPolicy:
    """One that refuses below a confidence of 0.5, of scores that were given as numbers."""
    return kind(
        **{
            "score": "confidence", "threshold": 0.5, "max_risk": 0.1, "confidence": 0.9, "num_examples": 100,
            "coverage": 0.5, "feasible": True, "model_risk": 0.2, **fields,
        }
    )  # fmt: skip
