#!/usr/bin/env bash
# torch 2.13.0: a CPU generator keeps the low 32 bits of its seed alone, though initial_seed() gives all 64 back: seeds
# that differ by 2**32 give the same numbers. Hashes of 64 bits taken as seeds collide as hashes of 32 bits do, so two of
# some 77,000 keys share all their noise with probability one half.
# A good guess would have been the 64 bits that manual_seed accepts (a CUDA generator uses them all).
# Seen: initial_seed() 0 and 4294967296, the same random numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PY'
import torch

print("torch", torch.__version__)
found = {}
for seed in (0, 1, 2**32, 2**32 + 1, 7 * 2**32):
    generator = torch.Generator().manual_seed(seed)
    found[seed] = (generator.initial_seed(), torch.rand(1000, generator=generator))
print([(seed, own) for seed, (own, _) in found.items()])
assert [own for own, _ in found.values()] == list(found)
assert torch.equal(found[0][1], found[2**32][1]) and torch.equal(found[0][1], found[7 * 2**32][1])
assert torch.equal(found[1][1], found[2**32 + 1][1]) and not torch.equal(found[0][1], found[1][1])
PY
