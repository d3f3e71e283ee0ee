"""This rank's part of a tensor, sharded or not."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
