#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: in the calibration errors of its functional API a confidence of exactly 1
# falls into a bin of its own, one more than n_bins. With ten bins, a right answer at 0.92 and a wrong one at
# 1.0 give an expected calibration error of 0.54; with 0.9999 in place of 1.0 it is 0.46.
# A good guess would have been that the last bin, (0.9, 1], holds both, so that 0.9999 and 1 differ by 1e-4:
# float32 softmax outputs of a confident model are exactly 1 as soon as its logits differ by some 17.
# Seen: l1 0.5400 and 0.4599, max 1.0000 and 0.4599, for both the multiclass and the binary function.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torchmetrics==1.9.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
import torchmetrics
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
labels = torch.tensor([1, 0])


def errors(top: float) -> dict[str, float]:
    """Of two predictions of class 1, the first right at 0.92 and the second wrong at `top`."""
    probs = torch.tensor([[0.08, 0.92], [1 - top, top]])
    found = {}
    for norm in ("l1", "max"):
        options = {"n_bins": 10, "norm": norm}
        found[f"multiclass {norm}"] = float(multiclass_calibration_error(probs, labels, num_classes=2, **options))
        found[f"binary {norm}"] = float(binary_calibration_error(probs[:, 1], labels, **options))
    return found


one, nearly = errors(1.0), errors(0.9999)
print("1.0   ", {name: round(value, 4) for name, value in one.items()})
print("0.9999", {name: round(value, 4) for name, value in nearly.items()})

accuracy, confidence = 0.5, (0.92 + 1.0) / 2
by_one_bin = abs(accuracy - confidence)
for kind in ("multiclass", "binary"):
    assert abs(nearly[f"{kind} l1"] - by_one_bin) < 1e-3
    assert abs(one[f"{kind} l1"] - (0.5 * (1 - 0.92) + 0.5 * 1.0)) < 1e-5
    assert abs(one[f"{kind} max"] - 1.0) < 1e-5 and abs(nearly[f"{kind} max"] - by_one_bin) < 1e-3
saturated = torch.tensor([17.5, 0.0]).softmax(0)
assert saturated[0] == 1.0, saturated
PY
