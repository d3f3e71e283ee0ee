"""Track storages: which module allocates them, their sizes, and when they are freed.

Independent of models and ranks. It works on tensors without data (torch's FakeTensorMode), whose
storages have their true size.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class Allocation:
    """One storage while it has this size; time counts allocations and frees."""

    part: str
    """The part of the memory it belongs to."""
    size: int
    """Bytes."""
    begin: int
    """Time of the allocation."""
    end: int | None = None
    """Time of the free; None while it is live."""


class AllocationTracker(TorchDispatchMode):
    """Records every storage that operators allocate, and the bytes that collectives move.

    A storage belongs to the part of the innermost module on the stack, of those in `parts`, when it
    is allocated. Enter this mode after FakeTensorMode, so that operators reach it first.
    """

    def __init__(self, parts: Mapping[str, str | None]) -> None:
        """Start without any allocation.

        Args:
            parts: {module: part}, of a module and all below it. Allocations of a module whose part
                is None are left out.
        """
        super().__init__()
        self.allocations: list[Allocation] = []
        self.only_part: str | None = None
        """The part of everything allocated from now on; None: by the stack."""
        self.collective_bytes: Counter[str] = Counter()
        """{collective: bytes of the larger of input and output, summed over calls}."""
        self._parts = parts
        self._live: dict[int, Allocation] = {}
        self.now = 0
        """Allocations and frees so far."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and record the storages of its result."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # It comes back with the local tensors.
        if func is torch.ops.prim.device.default:
            return func(*args)  # Called very often; allocates nothing.
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # Any number does: there is no data to read it from.
        if func is torch.ops.aten.detach.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():  # Tensor.numpy of a tensor that has data.
                return func(*args)
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            sizes = [value.nbytes for value in tree_iter(args) if isinstance(value, Tensor)]
            self.collective_bytes[func.overloadpacket.__name__] += max(sizes, default=0)
        for value in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._record(value.untyped_storage())
        return out

    def __enter__(self) -> "AllocationTracker":
        """Track operators, and resizes: by them FSDP2 frees and allocates, outside of operators."""
        resize = self._resize = torch.UntypedStorage.resize_

        def tracked_resize(storage: torch.UntypedStorage, size: int) -> None:
            self._record_free(storage._cdata)
            resize(storage, size)
            self._record(storage)

        torch.UntypedStorage.resize_ = tracked_resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop tracking."""
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def move(self, sources: Collection[str], target: str, since: int) -> None:
        """Reassign what is live of the parts `sources`, and was allocated from `since` on."""
        for allocation in self._live.values():
            if allocation.part in sources and allocation.begin >= since:
                allocation.part = target

    def _record(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._live or (part := self._part()) is None:
            return
        self._live[key] = Allocation(part, size, self.now)
        self.allocations.append(self._live[key])
        weakref.finalize(storage, self._record_free, key)
        self.now += 1

    def _record_free(self, key: int) -> None:
        if allocation := self._live.pop(key, None):
            allocation.end = self.now
            self.now += 1

    def _part(self) -> str | None:
        if self.only_part:
            return self.only_part
        frame = sys._getframe(1)
        while frame:
            name = frame.f_globals.get("__name__", "")
            for module, part in self._parts.items():
                if name == module or name.startswith(module + "."):
                    return part
            frame = frame.f_back  # type: ignore[assignment]
        return "other"


@dataclass(frozen=True)
class Peak:
    """The most memory that was live at once."""

    parts: Mapping[str, int]
    """{part: bytes} at the peak of all parts together."""
    highest: Mapping[str, int]
    """{part: bytes} of each part at its own peak."""

    @property
    def total(self) -> int:
        """Bytes of all parts at the peak."""
        return sum(self.parts.values())


def find_peak(allocations: Collection[Allocation], since: int = 0) -> Peak:
    """Replay all allocations and frees, and return the peak from time `since` on.

    Args:
        allocations: As a tracker recorded them.
        since: A time, as `AllocationTracker.now` counts it.
    """
    changes = [(a.begin, a.part, a.size) for a in allocations]
    changes += [(a.end, a.part, -a.size) for a in allocations if a.end is not None]
    now, highest, at_peak, total, most = Counter[str](), Counter[str](), Counter[str](), 0, 0
    for time, part, change in sorted(changes):
        now[part] += change
        total += change
        if time < since:
            highest, at_peak, most = now.copy(), now.copy(), total
        highest[part] = max(highest[part], now[part])
        if total > most:
            most, at_peak = total, now.copy()
    return Peak(at_peak, highest)
