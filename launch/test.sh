#!/usr/bin/env bash
# The whole test suite, set up from nothing: bash launch/test.sh [pytest arguments].
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
source launch/install.sh
install_skipstone test

echo "== style and types"
ruff check .
ruff format --check .
mypy
for script in launch/*.sh launch/*.slurm .ci/run; do bash -n "$script"; done

echo "== tests"
python -m pytest -q --durations=10 "$@"
