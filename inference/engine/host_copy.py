"""Numbers on their way from the device to the host."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor as it is now, which the host can read while the device goes on.

    Reading a tensor of a CUDA device itself, the host would wait for all that the device was told
    since.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy."""
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._host = tensor.clone()

    def read(self) -> Any:
        """Return the numbers as nested lists, after waiting until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
