#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, torch 2.13.0: copy.deepcopy of a model that an SFTTrainer was made around runs with
# the *original's* weights: trl replaces the model's forward by a function that keeps the original in its closure, and
# a deep copy shares functions. Whoever keeps a copy as the best or the averaged model evaluates another one, silently.
# A good guess would have been that a copy whose parameters are all set to 0 gives logits of 0, as it does before.
# Seen: largest logit of such a copy 0.0 before the trainer was made; afterwards the original's, 0.168.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 trl==1.16.0 datasets==5.2.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import copy

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", "a", "b", "c"])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
torch.manual_seed(0)
config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(config).eval()


@torch.no_grad()
def largest_logit(network):
    return network(input_ids=torch.tensor([[2, 3, 4]])).logits.abs().max().item()


@torch.no_grad()
def copy_of_zeros():
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.zero_()
    return other


before = largest_logit(copy_of_zeros())
arguments = SFTConfig("out", report_to="none", use_cpu=True, bf16=False, max_length=8, gradient_checkpointing=False)
SFTTrainer(model, arguments, train_dataset=Dataset.from_dict({"text": ["a b c"] * 4}), processing_class=tokenizer)
after, original = largest_logit(copy_of_zeros()), largest_logit(model.eval())
print("copy of zeros before:", before, "after:", after, "original:", original)
assert before == 0 and after == original > 0.1
PY
