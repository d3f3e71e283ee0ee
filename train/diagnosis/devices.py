"""torch and the GPUs: what it was built for, what it sees, and whether each can compute."""

from collections.abc import Iterator

from train.diagnosis.findings import Finding, Level, one_line
from train.diagnosis.machine import gib
from train.diagnosis.programs import answer
from train.diagnosis.surroundings import is_set, variable

CROWDED = 0.5
"""Share of a GPU's memory that should be free."""


def listed_gpus() -> int:
    """Return how many GPUs the driver lists, whatever torch makes of them."""
    status, text = answer(["nvidia-smi", "-L"])
    return text.count("GPU ") if status == 0 else 0


def check_torch() -> Iterator[Finding]:
    """Import torch, and multiply two matrices on every GPU.

    The number of GPUs is `gpus` of the details.
    """
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # of any library that it loads
        found = f"cannot be imported, {type(error).__name__}: {one_line(error)}"
        yield Finding("torch", Level.PROBLEM, found, "pip install --force-reinstall torch")
        return
    if not dist.is_available() or not dist.is_gloo_available():
        found = f"{torch.__version__} was built without torch.distributed or gloo"
        yield Finding("torch", Level.PROBLEM, found, "install the wheel of pytorch.org")
        return
    built = torch.version.cuda or torch.version.hip
    name = "ROCm" if torch.version.hip else "CUDA"
    found = f"{torch.__version__}" + (f", built for {name} {built}" if built else ", a CPU build")
    details: dict[str, object] = {"version": torch.__version__, "cuda": built}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        details["gpus"] = count
        if dist.is_nccl_available():
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
            found, details["nccl"] = f"{found}, NCCL {nccl}", nccl
        yield Finding("torch", Level.OK, found, details=details)
        for i in range(count):
            yield _gpu(i)
        return
    yield Finding("torch", Level.OK, found, details={**details, "gpus": 0})
    yield _none(built)


def _gpu(i: int) -> Finding:
    import torch

    name = f"{i}: {torch.cuda.get_device_name(i)}"
    try:
        ones = torch.ones(256, 256, device=f"cuda:{i}", dtype=torch.bfloat16)
        right = bool(((ones @ ones) == 256).all())
        free, total = torch.cuda.mem_get_info(i)
    except RuntimeError as error:
        remedy = "a torch built for this GPU, a newer driver, or nvidia-smi for its state"
        return Finding("gpu", Level.PROBLEM, f"{name} cannot compute, {one_line(error)}", remedy)
    details: dict[str, object] = {"free_bytes": free, "total_bytes": total}
    details["capability"] = ".".join(map(str, torch.cuda.get_device_capability(i)))
    if not right:
        remedy = "take it out of use: CUDA_VISIBLE_DEVICES, or drain the node"
        return Finding("gpu", Level.PROBLEM, f"{name} computes wrongly", remedy, details)
    found = f"{name}, {gib(free)} of {gib(total)} free"
    if free < CROWDED * total:
        remedy = "end other programs on it, see nvidia-smi"
        return Finding("gpu", Level.WARNING, found, remedy, details)
    return Finding("gpu", Level.OK, found, details=details)


def _none(built: str | None) -> Finding:
    """Return why torch sees no GPU."""
    listed = listed_gpus()
    if not listed:
        return Finding("gpu", Level.OK, "none: training runs on CPUs, with gloo")
    if is_set("CUDA_VISIBLE_DEVICES") and not variable("CUDA_VISIBLE_DEVICES").strip("-1 "):
        return Finding("gpu", Level.OK, f"{listed}, hidden by CUDA_VISIBLE_DEVICES")
    found = f"nvidia-smi lists {listed}, torch sees none"
    if built is None:
        remedy = "pip install --force-reinstall torch, a build with CUDA"
    else:
        remedy = f"a driver for CUDA {built}, or a torch built for the driver's, see nvidia-smi"
    return Finding("gpu", Level.PROBLEM, found, remedy)
