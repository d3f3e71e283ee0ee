#!/usr/bin/env bash
# From a bare machine to a self-speculating model: bash launch/quickstart.sh
# Installs, prepares the corpus every machine has, trains the demo preset on all GPUs (or two CPU
# ranks), measures every exit, and decodes with and without self-speculation. The same command again
# resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
source launch/install.sh
install_skipstone
# The demo's global batch of 8 sequences is dealt out evenly.
while [ $((8 % RANKS)) -ne 0 ]; do RANKS=$((RANKS - 1)); done

run=outputs/demo
reports=$run/reports
begin=$SECONDS
step() { echo && echo "== [$((SECONDS - begin)) s] $*"; }

step "text to token shards"
python -m data.prepare --input embedded --output outputs/data/embedded-2048 --vocab_size 2048

step "training on $RANKS ranks: torchrun --nproc_per_node=$RANKS train/main.py"
torchrun --standalone --nproc_per_node="$RANKS" train/main.py

# Decoding is one process; give it the cores the ranks had.
export OMP_NUM_THREADS=$((OMP_NUM_THREADS * RANKS))

step "held-out loss at every exit"
python -m inference.evaluate --run "$run" --json "$reports/exits.json" --plot "$reports/exits.png"

step "the same prompts, decoded in several ways with the same weights"
# float32 on a GPU too: in bfloat16 two tokens may tie, and passes of different shapes then differ.
python -m inference.benchmark --run "$run" \
  --strategies early_exit:E=3,self_speculative:E=3:d=2,self_speculative:E=5:d=2,self_speculative:E=5:d=6:stop=0.5:ngram=2,dynamic:ngram=2 \
  --prompts 4 --max_new_tokens 96 --dtype float32 \
  --json "$reports/speed.json" --plot "$reports/speed.png"

step "the fastest lossless strategy for this checkpoint on this machine"
python -m inference.tune --run "$run" --quick --dtype float32

step "a sample, decoded with it"
python -m inference.generate --run "$run" --prompt "def " --dtype float32

step "done; pictures: $reports/exits.png, $reports/speed.png"
echo "dashboard: tensorboard --logdir outputs    more text: python -m inference.generate --help"
