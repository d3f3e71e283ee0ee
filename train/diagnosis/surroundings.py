"""The variables that decide how ranks meet. Read here: the doctor starts where torch does not."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of our packages: a clone, or where pip has installed them."""
SHOWN = (
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTHONSAFEPATH"),
    *("NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_NET"),
    *("NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_CUMEM_ENABLE"),
    *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCHELASTIC_USE_AGENT_STORE"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "RANK", "LOCAL_RANK"),
    *("SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE"),
    *("SLURM_TASKS_PER_NODE", "SLURM_MEM_PER_NODE", "SLURM_RESTART_COUNT"),
)
"""The variables whose values go into a report: none holds a host, a path, a user or a key."""


def in_clone() -> bool:
    """Whether our packages lie in a clone, with setup.cfg, launch/ and tests/ beside them."""
    return (ROOT / "setup.cfg").is_file()


def variable(name: str) -> str:
    """Return the value of a variable, empty where it is not set."""
    return os.environ.get(name, "")


def is_set(name: str) -> bool:
    return name in os.environ


def shown_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in SHOWN if name in os.environ}


def launched_as() -> tuple[int, int, int] | None:
    """Return rank, local rank and number of ranks where torchrun or another launcher set them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank = os.environ["RANK"]
    return int(rank), int(os.environ.get("LOCAL_RANK", rank)), int(os.environ["WORLD_SIZE"])


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Set for this process what torchrun sets for a rank of one machine."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
