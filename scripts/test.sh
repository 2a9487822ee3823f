#!/usr/bin/env bash
# Makes or reuses .venv, then lints, type-checks and tests: bash scripts/test.sh [arguments of pytest, such as -m slow]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment test
say "ruff"
python -m ruff check .
python -m ruff format --check .
say "mypy --strict bayeformers"
python -m mypy --strict bayeformers
say "pytest"
# two test processes of one thread each are faster than one of two threads on models as small as the tests'
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist worksteal "$@"
