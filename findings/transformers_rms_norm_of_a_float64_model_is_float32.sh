#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: the RMSNorm layers of Qwen2 and Llama convert their input to
# float32, and T5's computes its variance in float32, in a model made float64 with .double() too.
# The output is a float64 tensor with float32 accuracy, so a float64 reference or a gradient check
# built on such a model is good to about 1e-7 only.
# A good guess would have been that the float32 step only raises half precision and leaves float64
# alone, as torch.nn.functional.rms_norm does on the same input.
# Seen: relative errors of 1e-7 to 2e-7 for the three layers and of 4e-16 for torch's function.
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
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
x = torch.randn(4, 64, dtype=torch.float64)
weight = torch.rand(64, dtype=torch.float64) + 0.5
expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def error(output):
    assert output.dtype == torch.float64
    return ((output - expected).abs() / expected.abs()).max().item()


exact = error(F.rms_norm(x, (64,), weight, 1e-6))
print(f"torch.nn.functional.rms_norm: relative error {exact:.1e}")
assert exact < 1e-14
for kind in (Qwen2RMSNorm, LlamaRMSNorm, T5LayerNorm):
    norm = kind(64, eps=1e-6).double()
    with torch.no_grad():
        norm.weight.copy_(weight)
        found = error(norm(x))
    print(f"{kind.__name__}: relative error {found:.1e}")
    assert 1e-9 < found < 1e-6
PY
