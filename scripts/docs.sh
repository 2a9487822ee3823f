#!/usr/bin/env bash
# Makes or reuses .venv, then builds the documentation into site/: bash scripts/docs.sh [arguments of mkdocs build]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment docs
say "mkdocs build --strict $*"
# the theme's notice about a future mkdocs is no warning about these pages
NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --config-file scripts/mkdocs.yml "$@"
