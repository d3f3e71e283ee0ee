"""Peak memory of some work: on CUDA allocated, on a CPU growth of the resident set."""

from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> int | None:
    """Reset the peak; return the bytes that the next one is counted from."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
    except OSError:
        return None
    return _resident("VmRSS")


def peak_since(before: int | None, device: torch.device) -> int | None:
    """Return the most bytes since `reset_peak_memory` returned `before`; None where unknown."""
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """Return a size, in bytes, that the kernel keeps of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(kilobytes) * 1024
