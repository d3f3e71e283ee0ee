#!/usr/bin/env bash
# The whole test suite, set up from nothing: bash launch/test.sh [--oldest] [pytest arguments].
# --oldest takes the oldest torch that setup.cfg allows, in an environment of its own (5 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
source launch/install.sh
if [ "${1:-}" = --oldest ]; then
  shift
  SKIPSTONE_TORCH=$(sed -n 's/^ *torch>=//p' setup.cfg)
fi
install_skipstone test

echo "== style and types"
ruff check .
ruff format --check .
# The types are those of the pinned torch.
[ -n "${SKIPSTONE_TORCH:-}" ] || mypy
for script in launch/*.sh launch/*.slurm .ci/run; do bash -n "$script"; done

# The tests of launch/train.slurm start a real SLURM. Where it is missing and may be installed, it is.
if ! command -v slurmctld >/dev/null 2>&1 && [ ! -x /usr/sbin/slurmctld ] &&
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "== installing the Debian packages slurm-wlm and munge"
  {
    timeout 200 apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive timeout 300 \
        apt-get install -y -qq --no-install-recommends slurm-wlm munge
  } >/dev/null 2>&1 || echo "not possible here: the tests that need them are skipped"
fi

echo "== tests"
python -m pytest -q --durations=10 "$@"
