#!/usr/bin/env bash
# peft 0.21.2, optimum-quanto 0.2.7, transformers 5.23.0, torch 2.13.0: merge_adapter() of a LoRA over weights that quanto
# quantised raises nothing and marks the layers as merged, but the weights do not change: the outputs afterwards are
# those of the base alone, as if the adapter were switched off.
# A good guess would have been the adapter's outputs up to the error of quantising again, as with bitsandbytes.
# Seen (tiny Llama, int8 and int4): merged minus base 0.0, merged minus unmerged 0.36 and 0.35.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 peft==0.21.2 optimum-quanto==0.2.7 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained("base")
ids = torch.arange(2, 12)[None]
for bits in ("int8", "int4"):
    model = AutoModelForCausalLM.from_pretrained("base", quantization_config=QuantoConfig(weights=bits))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        model.merge_adapter()
        merged = model(input_ids=ids).logits
    print(bits, "merged - base", (merged - base).abs().max().item(), "merged - unmerged", (merged - adapted).abs().max().item())
    assert torch.equal(merged, base) and (merged - adapted).abs().max() > 0.1
PY
