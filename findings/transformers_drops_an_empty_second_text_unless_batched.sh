#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: a fast tokenizer called with a pair of texts of which the second is "" treats the
# call as one text: no second separator, no second segment. In a batch the same pair keeps both. So a row of a sentence-pair
# task with an empty second sentence has other ids when it is predicted alone than when it is predicted with others.
# A good guess would have been the batch's ids in both cases.
# Seen: alone [2, 4, 5, 3]; in a batch of one [2, 4, 5, 3, 3].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat"])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]")
alone, batched = tokenizer("the cat", "")["input_ids"], tokenizer(["the cat"], [""])["input_ids"][0]
print("alone", alone, "in a batch of one", batched)
assert alone == [2, 4, 5, 3] and batched == [2, 4, 5, 3, 3], (alone, batched)
PY
