"""Copy numbers between a device and the host without stalling either."""

from typing import Any

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, without waiting for kernels launched before.

    A copy of more than 64 KiB would wait for them, were it from memory that is not page-locked.
    """
    pinned = host.pin_memory() if device.type == "cuda" else host
    return pinned.to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor's present values, which the host reads while the device goes on.

    Reading the tensor itself would wait for every CUDA kernel launched since.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy, without waiting for it."""
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._host = tensor.clone()

    def read(self) -> Any:
        """Return the numbers as nested lists, waiting for this copy alone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
