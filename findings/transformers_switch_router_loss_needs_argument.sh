#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: SwitchTransformersForConditionalGeneration does not read
# config.output_router_logits. With it set to True the loss is the bare cross entropy; only the
# argument output_router_logits=True of forward adds the router's z loss and load-balancing loss.
# A good guess would have been that the config is the argument's default, as it is for
# MixtralForCausalLM, which the script runs beside it. Nothing warns, so training balances no expert.
# Seen: Switch 4.47 by config, 9.04 by argument; Mixtral 3.73 by config, 3.53 with the argument False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
inputs = torch.randint(2, 32, (2, 6))
labels = torch.randint(2, 32, (2, 5))

switch = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(
    vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_experts=4, expert_capacity=64,
    num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1,
    dropout_rate=0.0, router_jitter_noise=0.0, decoder_start_token_id=0,
    router_z_loss_coef=0.1, router_aux_loss_coef=0.1, output_router_logits=True,
)).eval()
mixtral = MixtralForCausalLM(MixtralConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.1, output_router_logits=True,
)).eval()
assert switch.config.output_router_logits and mixtral.config.output_router_logits

with torch.no_grad():
    by_config = switch(input_ids=inputs, labels=labels)
    by_argument = switch(input_ids=inputs, labels=labels, output_router_logits=True)
    mixtral_by_config = mixtral(input_ids=inputs, labels=inputs)
    mixtral_without = mixtral(input_ids=inputs, labels=inputs, output_router_logits=False)
cross_entropy = F.cross_entropy(by_config.logits.reshape(-1, 32), labels.reshape(-1))
router = 0.1 * (
    by_argument.encoder_z_loss + by_argument.decoder_z_loss
    + by_argument.encoder_aux_loss + by_argument.decoder_aux_loss
)
print(f"Switch: cross entropy by hand {cross_entropy:.4f}, router terms {router:.4f}")
print(f"Switch: loss by config {by_config.loss:.4f}, by argument {by_argument.loss:.4f}")
print(f"Mixtral: loss by config {mixtral_by_config.loss:.4f}, argument False {mixtral_without.loss:.4f}")

torch.testing.assert_close(by_config.loss, cross_entropy)
torch.testing.assert_close(by_argument.loss, cross_entropy + router)
assert by_config.encoder_z_loss is None and router > 1
assert mixtral_by_config.loss > mixtral_without.loss + 0.05
PY
