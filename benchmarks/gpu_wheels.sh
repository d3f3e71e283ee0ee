#!/usr/bin/env bash
# Download the wheels that a GPU machine without a package registry lacks, on one that has a
# registry; the versions are those of launch/constraints.txt.
#
#     bash benchmarks/gpu_wheels.sh wheels
#     pip install --no-index --no-deps wheels/*.whl     # on the GPU machine
#
# Such a machine is expected to have torch, numpy, transformers (so safetensors, tokenizers, pyyaml,
# jinja2, filelock, fsspec, tqdm, packaging, regex) and sentencepiece. What it lacks beside these,
# training says: `python -c "import train.main"` names the next one. Without tensorboard and
# pyarrow, benchmarks/gpu.py runs all the same.
set -euo pipefail
folder=${1:-wheels}
root=$(cd "$(dirname "$0")/.." && pwd)
packages=(torchtitan spmd_types torch_checkpointing torchdata tyro docstring_parser typeguard
  tensorboard tensorboard-data-server absl-py grpcio Markdown protobuf Werkzeug pyarrow)
mkdir -p "$folder"
for package in "${packages[@]}"; do
  grep -iE "^${package}==" "$root/launch/constraints.txt"
done >"$folder/requirements.txt"
cat "$folder/requirements.txt"
[ "${LIST_ONLY:-}" ] || pip download --no-deps --only-binary=:all: --dest "$folder" \
  --requirement "$folder/requirements.txt"
