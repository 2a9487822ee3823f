#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0: DPOTrainer given a PEFT model makes its reference adapter from
# `model.peft_config["default"]`, whatever the active adapter is called: with an adapter of another name, which
# get_peft_model(adapter_name=...) allows, it raises KeyError: 'default' before any step. With the name "default" it trains.
# A good guess would have been the active adapter's configuration, which the rest of the trainer uses.
# Seen: "default" trains a step; "mine" raises KeyError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
vocabulary = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *"abcde"])}
words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
config = LlamaConfig(
    vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=1,
)
data = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" c"] * 4, "rejected": [" d"] * 4})
options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
found = {}
for name in ("default", "mine"):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=name)
    try:
        trainer = trl.DPOTrainer(
            model, args=trl.DPOConfig("out", **options), train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        found[name] = "trains"
    except KeyError as error:
        found[name] = f"KeyError: {error}"
print(found)
assert found == {"default": "trains", "mine": "KeyError: 'default'"}, found
PY
