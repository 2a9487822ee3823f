#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: PeftModel.from_pretrained raises and warns nothing where the adapter's
# file holds a tensor that no layer takes, such as a factor beside lora_A that another tool saved: it is left out, and
# the model computes something else than the one that was saved. (load_adapter returns the names; nobody prints them.)
# A good guess would have been an error, or the report that transformers prints of unexpected keys.
# Seen: no warning that names the tensor, and load_adapter's unexpected_keys holding it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import contextlib
import io
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
get_peft_model(LlamaForCausalLM(config), lora).save_pretrained("adapter")
file = "adapter/adapter_model.safetensors"
tensors = load_file(file)
added = next(name for name in tensors if "lora_A" in name).replace("lora_A.weight", "lora_A.factor")
save_file(tensors | {added: torch.full((4,), 3.0)}, file)
said = io.StringIO()
with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    warnings.simplefilter("always")
    PeftModel.from_pretrained(LlamaForCausalLM(config), "adapter")
told = [text for text in [said.getvalue(), *(str(one.message) for one in warned)] if "factor" in text]
result = get_peft_model(LlamaForCausalLM(config), lora).load_adapter("adapter", "other")
print("told:", told, "unexpected_keys:", result.unexpected_keys)
assert not told and result.unexpected_keys == [added]
PY
