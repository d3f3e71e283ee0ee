# Makes .venv with everything pinned in launch/constraints.txt; source it from the repository root.
# Does nothing where that is up to date. SKIPSTONE_TORCH=2.11 makes .venv-torch-2.11 with that torch
# and the other pins.

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: python, none of version 3.11 or newer found, install one or set PYTHON" >&2
  return 1
}

# install_skipstone [EXTRA]: our package and its dependencies, and those of the extra.
install_skipstone() {
  local python pins stamp venv=".venv${SKIPSTONE_TORCH:+-torch-$SKIPSTONE_TORCH}"
  pins=$(sed "${SKIPSTONE_TORCH:+s/^torch==.*/torch==$SKIPSTONE_TORCH/}" launch/constraints.txt)
  stamp=$(cat setup.cfg pyproject.toml <(echo "$pins") | cksum)
  export PATH="$PWD/$venv/bin:$PATH"
  if [ "$(cat "$venv/installed-${1:-}" "$venv/installed-test" 2>/dev/null | head -n 1)" = "$stamp" ]; then
    return
  fi
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$venv"
  fi
  echo "== installing into $venv ($("$venv/bin/python" --version)), a few minutes"
  echo "$pins" >"$venv/constraints.txt"
  # torch first and pinned: pip then takes the build made for this machine, once.
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$venv/constraints.txt" torch
  "$venv/bin/pip" install --quiet --disable-pip-version-check -c "$venv/constraints.txt" \
    -e ".${1:+[$1]}"
  echo "$stamp" >"$venv/installed-${1:-}"
}
