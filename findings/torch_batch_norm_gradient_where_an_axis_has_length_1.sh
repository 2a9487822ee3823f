#!/usr/bin/env bash
# torch 2.13.0 (CPU): the gradient of a batch norm in its input is wrong, without a word, where some axis has length 1
# (a batch of one image, say) and the gradient that arrives is laid out otherwise than the input: a convolution gives
# rows, but tokens made of the picture by flatten(2).transpose(1, 2) send back a permuted gradient. The forward pass is
# right, eval() and train() are both wrong, and with two images in the batch all is right.
# A good guess would have been that strides change the speed of a gradient and never its values.
# Seen: in eval() an error of .97 of the largest gradient with one image, 7e-16 with two; in train() the two layouts of
# one arriving gradient give results 1.2 of the largest value apart.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torch import nn

print("torch", torch.__version__)
torch.manual_seed(0)
conv, norm, head = nn.Conv2d(3, 6, 3, padding=1).double(), nn.BatchNorm2d(6).double().eval(), nn.Linear(6, 2).double()
with torch.no_grad():
    norm.running_var.uniform_(0.5, 2.0)
    norm.weight.uniform_(0.5, 2.0)


def gradient_of_the_convolution(images, normalise):
    found = conv(images)
    tokens = normalise(found).flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)  # a summary before the tokens
    return torch.autograd.grad(torch.tanh(head(tokens))[:, 1:].square().sum(), found)[0]


def by_its_formula(x):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


images = torch.randn(2, 3, 2, 2, dtype=torch.float64)
errors = {}
for count in (1, 2):
    expected = gradient_of_the_convolution(images[:count], by_its_formula)
    found = gradient_of_the_convolution(images[:count], norm)
    errors[count] = float((found - expected).abs().max() / expected.abs().max())
    print(f"eval(), {count} image(s): relative error {errors[count]:.1e}")

x = torch.randn(1, 6, 2, 2)
permuted = torch.randn(1, 4, 6).transpose(1, 2).reshape(1, 6, 2, 2)
norm = nn.BatchNorm2d(6).train()
found = []
for arriving in (permuted, permuted.contiguous()):
    given = x.clone().requires_grad_()
    found.append(torch.autograd.grad(norm(given), given, arriving)[0])
apart = float((found[0] - found[1]).abs().max() / found[1].abs().max())
print(f"train(), 1 image: the gradient by the layout of what arrives differs by {apart:.1e} of its largest value")
assert errors[1] > 0.1 and errors[2] < 1e-12 and apart > 0.1
PY
