"""torch's Muon for sharded matrices: one rank orthogonalises each, whole.

torch.optim.Muon accepts DTensors too, but iterates on all ranks at once, with 12 to 31 collectives
for every matrix (torch 2.13). Here n ranks exchange their parts of n matrices, so that each rank
has one whole matrix: two collectives for all n, three where the model is replicated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from train.parallel.local_part import local_part

ADAMW_RMS = 0.2


class Muon(torch.optim.Muon):
    """Muon with updates of AdamW's size, so that lr and weight_decay are AdamW's.

    For a matrix W of A x B with the gradient G (arXiv 2502.16982, section 2):
        M = mu M + (1 - mu) G,  O = newton_schulz(mu M + (1 - mu) G)
        W = (1 - lr weight_decay) W - lr 0.2 sqrt(max(A, B)) O
    as torch.optim.Muon computes it with adjust_lr_fn="match_rms_adamw", bit for bit on one rank. O
    is near an orthogonal matrix, so that the RMS of the update is near lr 0.2.

    Where `found_inf`, a scalar on the device, is not 0, a step leaves weights and momenta as they
    are; the host does not wait for it.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: ParamsT) -> None:
        """Accept torch's options by group; all matrices are sharded alike, or none is."""
        super().__init__(params, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient; every rank calls this."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            # Matrices orthogonalised at the same time are then of similar size.
            matrices.sort(key=Tensor.numel, reverse=True)
            copies, shards = _mesh_axes(matrices[0]) if matrices else (Axis(), Axis())
            at_once = copies.size * shards.size
            for first in range(0, len(matrices), at_once):
                some = matrices[first : first + at_once]
                directions = map_matrices(
                    [self._momentum(p, group) for p in some],
                    [len(p) for p in some],
                    partial(_orthogonalize, group),
                    copies,
                    shards,
                )
                for p, direction in zip(some, directions, strict=True):
                    self._apply(p, direction, group)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Update M and return this rank's part of mu M + (1 - mu) G, to be orthogonalised."""
        assert p.grad is not None
        state, mu = self.state[p], group["momentum"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        before, grad = local_part(state["momentum_buffer"]), local_part(p.grad)
        after = before.lerp(grad, 1 - mu)
        update = grad.lerp(after, mu) if group["nesterov"] else after
        self._write(before, after)
        device = p.device_mesh.device_type if isinstance(p, DTensor) else p.device
        return update.to(device, torch.bfloat16)

    def _apply(self, p: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        """Update this rank's part of W; `direction` is its part of O."""
        lr, weights = group["lr"], local_part(p)
        after = weights.mul(1 - lr * group["weight_decay"])
        scale = lr * (ADAMW_RMS * max(p.shape) ** 0.5)
        self._write(weights, after.add_(direction.to(after.device), alpha=-scale))

    def _write(self, target: Tensor, value: Tensor) -> None:
        if self.found_inf is not None:
            value = torch.where(self.found_inf.bool(), target, value)
        target.copy_(value)


def _orthogonalize(group: dict[str, Any], matrix: Tensor) -> Tensor:
    return newton_schulz(
        matrix, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
    )


def newton_schulz(
    matrix: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float
) -> Tensor:
    """Return nearly U V^T of matrix = U S V^T, rows by columns: singular values near 1.

      X = X / ||X||, then `steps` times X = a X + (b X X^T + c (X X^T)^2) X

    With torch's coefficients and 5 steps, all singular values but the smallest lie in 0.7 to 1.2.
    """
    a, b, c = coefficients
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


@dataclass(frozen=True)
class Axis:
    """This rank along one axis of the mesh."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


def _mesh_axes(p: Tensor) -> tuple[Axis, Axis]:
    """Return the axes over which a parameter is replicated, and over which its rows are sharded."""
    copies = shards = Axis()
    if not isinstance(p, DTensor):
        if not dist.is_initialized():
            return copies, shards
        return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), shards
    for i, placement in enumerate(p.placements):
        mesh = p.device_mesh
        axis = Axis(mesh.get_local_rank(i), mesh.size(i), mesh.get_group(i))
        if placement.is_replicate():
            copies = axis
        else:
            assert placement.is_shard(0), "FSDP2 splits rows"
            shards = axis
    return copies, shards


def map_matrices(
    parts: Sequence[Tensor],
    rows: Sequence[int],
    function: Callable[[Tensor], Tensor],
    copies: Axis,
    shards: Axis,
) -> list[Tensor]:
    """Apply a function of whole matrices to sharded ones, each on one rank.

    Args:
        parts: This rank's rows of each matrix, at most as many matrices as ranks.
        rows: Number of rows of each whole matrix.
        function: Maps (rows, columns) to the same shape.
        copies: Ranks with the same parts as this one.
        shards: Ranks with other parts of the same matrices.

    Returns:
        This rank's rows of each result.
    """
    first = copies.rank * shards.size
    own = slice(first, first + shards.size)
    done = _exchange(parts[own], rows[own], function, shards)
    if copies.size == 1:
        return done
    # Each replica has computed other matrices and adds 0 to the rest, so all get the same bits.
    found = [torch.zeros_like(part) for part in parts]
    found[own] = done
    flat = torch.cat([part.reshape(-1) for part in found])
    dist.all_reduce(flat, group=copies.group)
    return _like(parts, flat)


def _exchange(
    parts: Sequence[Tensor],
    rows: Sequence[int],
    function: Callable[[Tensor], Tensor],
    shards: Axis,
) -> list[Tensor]:
    """Apply `function` to the i-th matrix on the i-th rank; see `map_matrices`."""
    if shards.size == 1 or not parts:
        return [function(part) for part in parts]
    columns = [part.shape[1] for part in parts]
    sent = [part.numel() for part in parts] + [0] * (shards.size - len(parts))
    received = [0] * shards.size
    if mine := shards.rank < len(parts):
        received = [n * columns[shards.rank] for n in _split(rows[shards.rank], shards.size)]
    whole = parts[0].new_empty(sum(received))
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_to_all_single(whole, flat, received, sent, group=shards.group)
    if mine:
        whole = function(whole.view(-1, columns[shards.rank])).reshape(-1)
    dist.all_to_all_single(flat, whole, sent, received, group=shards.group)
    return _like(parts, flat)


def _split(rows: int, size: int) -> list[int]:
    """Return how many rows each rank has, as FSDP2 chunks them: the last ranks may have fewer."""
    most = -(-rows // size)
    return [max(min(most, rows - rank * most), 0) for rank in range(size)]


def _like(parts: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    sizes = [part.numel() for part in parts]
    return [new.view_as(part) for new, part in zip(flat.split(sizes), parts, strict=True)]
