# Environment of every launch script; source it from the repository root. Each line has its reason.

# Our packages are imported by the names of their folders; the root goes before installed namesakes.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Keeps `train/main.py` from putting train/ itself on the path.
export PYTHONSAFEPATH=1
# The cores of this job, which SLURM need not bind it to; elsewhere those of the machine.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-$(nproc 2>/dev/null || echo 2)}}
# One process for each GPU; without one, two CPU ranks.
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  RANKS=${RANKS:-$(nvidia-smi -L | wc -l)}
else
  RANKS=${RANKS:-$((cores > 1 || ${SLURM_JOB_ID:-0} == 0 ? 2 : 1))}
fi
export RANKS
# Threads of one rank: the cores shared out, so that ranks do not crowd each other.
threads=$((cores / RANKS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
# A new store for every attempt of torchrun: its restarts on several nodes would otherwise read the
# addresses of ranks that are gone (pytorch#167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Stochastic depth changes the sizes of what a step allocates: memory that grows does not fragment.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
