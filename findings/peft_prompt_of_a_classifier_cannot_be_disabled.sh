#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: `with model.disable_adapter()` of prompt tuning on a sequence classifier
# raises UnboundLocalError as it is entered or left; on a causal language model the same call works. It saves the base's
# prepare_inputs_for_generation only where the model generates, and puts it back in any case.
# A good guess would have been the base's outputs inside the block, as of every other kind of adapter.
# Seen: UnboundLocalError, old_prepare_inputs_for_generation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
ids = torch.arange(2, 8)[None]
bert = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
classifier = get_peft_model(
    BertForSequenceClassification(bert), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
)
decoder = get_peft_model(
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)),
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
)
with decoder.disable_adapter():
    print("causal language model", tuple(decoder(input_ids=ids).logits.shape))
try:
    with classifier.disable_adapter():
        classifier(input_ids=ids)
except UnboundLocalError as error:
    print("sequence classifier", type(error).__name__, error)
else:
    raise SystemExit("no error: the behaviour has changed")
PY
