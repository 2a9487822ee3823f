#!/usr/bin/env bash
# Makes .venv, installs the package and runs the GLUE example: bash scripts/quickstart.sh [arguments of examples.bert_glue]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment examples
say "python -m examples.bert_glue $*"
python -m examples.bert_glue "$@"
