#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: PixioBackbone has two LayerNorms, its own `layernorm` and the
# inner model's `pixio.layernorm`. After save_pretrained and from_pretrained each holds the other's
# weights, with no warning and no missing or unexpected key, and the feature maps change.
# A good guess would have been that a saved model comes back as it was. The file itself is right:
# it stores the inner norm under `encoder.layernorm`, so the swap happens while loading.
# Seen: own norm 2.0 -> 3.0, inner norm 3.0 -> 2.0; the largest feature grows from 5.7 to 8.6.
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
import transformers
from safetensors.torch import load_file
from transformers import PixioBackbone, PixioConfig

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = PixioConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
    image_size=8, patch_size=4, n_cls_tokens=1,
)
model = PixioBackbone(config).eval()
with torch.no_grad():
    model.layernorm.weight.fill_(2.0)
    model.pixio.layernorm.weight.fill_(3.0)

model.save_pretrained("saved")
stored = load_file("saved/model.safetensors")
for name in ("layernorm.weight", "encoder.layernorm.weight"):
    print("in the file:", name, stored[name][0].item())
loaded, info = PixioBackbone.from_pretrained("saved", output_loading_info=True)
loaded.eval()

for name in ("layernorm.weight", "pixio.layernorm.weight"):
    before, after = model.get_parameter(name)[0].item(), loaded.get_parameter(name)[0].item()
    print(f"{name}: {before} before saving, {after} after loading")
image = torch.randn(1, 3, 8, 8)
with torch.no_grad():
    before, after = (m(image).feature_maps[0].abs().max().item() for m in (model, loaded))
print(f"largest feature: {before:.4f} before saving, {after:.4f} after loading")

changed = [n for n, p in model.named_parameters() if not torch.equal(p, loaded.get_parameter(n))]
assert sorted(changed) == ["layernorm.weight", "pixio.layernorm.weight"], changed
assert torch.equal(loaded.layernorm.weight, model.pixio.layernorm.weight)
assert torch.equal(loaded.pixio.layernorm.weight, model.layernorm.weight)
assert not any(info.values()), info
PY
