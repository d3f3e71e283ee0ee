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

# Some tests start a real SLURM, some open pages in Chromium. What is missing and may be installed, is.
packages=()
command -v slurmctld >/dev/null 2>&1 || [ -x /usr/sbin/slurmctld ] || packages+=(slurm-wlm munge)
command -v chromium >/dev/null 2>&1 || packages+=(chromium)
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "== installing the Debian packages ${packages[*]}"
  {
    timeout 200 apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive timeout 400 \
        apt-get install -y -qq --no-install-recommends "${packages[@]}"
  } >/dev/null 2>&1 || echo "not possible here: the tests that need them are skipped"
fi

echo "== tests"
python -m pytest -q --durations=10 "$@"
