#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0, torch 2.13.0: with peft.helpers.DoraCaching switched on, a DoRA model in eval() keeps
# the product B A and the norm of the first weights that it ran with. Loading another state dict into the adapter
# (set_peft_model_state_dict) does not clear them: the outputs are then of neither adapter. Only train() clears them.
# A good guess would have been that loading weights empties the cache.
# Seen (tiny Llama): after loading, outputs differ from the loaded adapter's by 0.17; with the cache off by 0.0.
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
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import DoraCaching
from transformers import LlamaConfig, LlamaForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def adapted(seed):
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    return get_peft_model(base, lora).eval()


ids = torch.arange(2, 12)[None]
served, update = adapted(1), adapted(2)
switch = DoraCaching()
with torch.no_grad():
    expected = update(input_ids=ids).logits
    switch(enabled=True)
    served(input_ids=ids)
    set_peft_model_state_dict(served, get_peft_model_state_dict(update))
    cached = served(input_ids=ids).logits
    switch(enabled=False)
    uncached = served(input_ids=ids).logits
print("cached - expected", (cached - expected).abs().max().item(), "uncached - expected", (uncached - expected).abs().max().item())
assert torch.equal(uncached, expected) and (cached - expected).abs().max() > 0.1
PY
