"""The parts of torchtitan we build on, imported in this one file.

torchtitan 0.3 treats a machine without an accelerator as a CUDA machine and needs the "fake"
process group backend registered for mesh axes of size 1; both are corrected before its import.
"""

# ruff: noqa: E402
import torch
import torch._utils
import torch.testing._internal.distributed.fake_pg  # registers the "fake" backend

if not torch.cuda.is_available():
    # torchtitan/tools/utils.py: `_get_available_device_type() or "cuda"`.
    torch._utils._get_available_device_type = lambda: "cpu"

from typing import TYPE_CHECKING, Literal

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.tools.utils import GarbageCollection, get_peak_flops

if TYPE_CHECKING:
    from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

__all__ = [
    "GarbageCollection",
    "OptimizersContainer",
    "ParallelDims",
    "ParamGroupConfig",
    "activation_checkpointing",
    "clip_grad_norm_",
    "get_peak_flops",
]


def activation_checkpointing(mode: Literal["full", "selective"]) -> "ActivationCheckpointing":
    """Return the policy, to be applied to a model; blocks draw no random numbers.

    Imported here: it imports torch's compiler, which takes a second.
    """
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    policy = FullAC if mode == "full" else SelectiveAC
    return policy.Config(preserve_rng_state=False).build(dump_folder="")
