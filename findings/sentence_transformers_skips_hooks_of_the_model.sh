#!/usr/bin/env bash
# sentence-transformers 6.2.0, transformers 5.23.0, torch 2.13.0: SentenceTransformer calls the forward method of the
# transformers model inside, not the model: forward hooks (and pre-hooks) registered on that model never run, while
# those of the modules in it do. Whatever counts, times or prepares a pass by a hook on the model sees nothing.
# A good guess would have been that encode() runs the hooks of the model as a call of it does.
# Seen: after one encode() the hooks that ran were those of the encoder inside alone; after a call both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0 sentence-transformers==6.2.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
from pathlib import Path

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

print("sentence-transformers", sentence_transformers.__version__, "transformers", transformers.__version__)
Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BertModel(config).save_pretrained("encoder")
BertTokenizerFast("vocab.txt").save_pretrained("encoder")
model = SentenceTransformer("encoder", device="cpu")
inner, ran = model[0].auto_model, []
inner.register_forward_hook(lambda *_: ran.append("model"))
inner.encoder.register_forward_hook(lambda *_: ran.append("encoder"))
model.encode(["a b"])
encoded = list(ran)
inner(input_ids=torch.tensor([[2, 5, 6, 3]]))
called = ran[len(encoded) :]
print("hooks of encode():", encoded, "of a call:", called)
assert encoded == ["encoder"] and called == ["encoder", "model"]
PY
