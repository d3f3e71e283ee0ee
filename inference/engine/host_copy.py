"""Copies of device tensors on the host, without waiting for the device."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor as it is now, which the host can read while the device goes on.

    To read a CUDA tensor itself, the host would wait for all kernels launched since.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._host = tensor.clone()

    def read(self) -> Any:
        """Return the numbers as nested lists, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
