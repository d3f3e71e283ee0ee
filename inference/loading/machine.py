"""The machine that numbers were measured on."""

import platform
from datetime import UTC, datetime
from pathlib import Path

import torch


def machine() -> dict[str, str | int | None]:
    """Return what a result depends on besides the checkpoint: processor, threads, torch, date."""
    return {
        "platform": platform.platform(),
        "cpu": processor(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor(device: torch.device) -> str:
    """Return the model name of a CUDA device, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
