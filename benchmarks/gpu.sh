#!/usr/bin/env bash
# Is everything right on a GPU, and what does it cost? At most 8 minutes; nothing is downloaded:
#
#   bash benchmarks/gpu.sh                                       # outputs/gpu/results.json and results.md
#   bash benchmarks/gpu.sh --only draws_equal_cpu,one_rank
#   bash benchmarks/gpu.sh --tiny --device cpu                   # every check at tiny size, without a GPU
#
# The exit status is 1 if a check failed and 2 without such a device. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" # one GPU: with several, the Trainer asks for a launcher
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m benchmarks.gpu "$@"
