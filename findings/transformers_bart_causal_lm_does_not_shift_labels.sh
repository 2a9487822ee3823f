#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: BartForCausalLM compares the logits of position t with the
# label of position t; GPT2LMHeadModel and LlamaForCausalLM compare them with the label of t + 1.
# So the usual call with labels=input_ids asks Bart to copy its input, not to predict the next token.
# A good guess would have been that every ...ForCausalLM shifts its labels inside; with Bart the
# caller has to shift them. The script computes both losses by hand for the three models.
# Seen: Bart's loss is the unshifted one to every printed digit, the other two are the shifted one.
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
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
tokens = torch.randint(3, 32, (2, 7))
models = [
    BartForCausalLM(BartConfig(
        vocab_size=32, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=16, init_std=0.5,
    )),
    GPT2LMHeadModel(GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2,
    )),
    LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5,
    )),
]
for model in models:
    model.eval()
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    same = F.cross_entropy(output.logits.reshape(-1, 32), tokens.reshape(-1))
    following = F.cross_entropy(output.logits[:, :-1].reshape(-1, 32), tokens[:, 1:].reshape(-1))
    name = type(model).__name__
    print(f"{name}: loss {output.loss:.6f}; by hand {same:.6f} unshifted, {following:.6f} shifted")
    assert abs(same - following) > 0.01
    torch.testing.assert_close(output.loss, same if name == "BartForCausalLM" else following)
PY
