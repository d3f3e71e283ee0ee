"""A tracker of storages: what is made, by whom, how large, and until when it lives.

Knows nothing of models or ranks. It works on tensors without data (torch's FakeTensorMode), whose
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
    """One storage, from when it has this size to when it has not."""

    part: str
    """What it is part of."""
    size: int
    """Bytes."""
    begin: int
    """Place of its birth among all births and deaths."""
    end: int | None = None
    """Place of its death; None while it lives."""


class AllocationTracker(TorchDispatchMode):
    """Notes every storage that operators make under it, and what collectives move.

    A storage belongs to the part of the innermost module on the stack, of those in `parts`, when it
    is made. Enter it after FakeTensorMode, so that it sees operators first.
    """

    def __init__(self, parts: Mapping[str, str | None]) -> None:
        """Start an empty tracker.

        Args:
            parts: {module: part}; a module stands for all below it. What a module makes whose part
                is None is left out.
        """
        super().__init__()
        self.allocations: list[Allocation] = []
        self.only_part: str | None = None
        """The part of everything made from now on; None: by the stack."""
        self.collective_bytes: Counter[str] = Counter()
        """{collective: bytes of the larger of what goes in and what comes out, over all calls}."""
        self._parts = parts
        self._alive: dict[int, Allocation] = {}
        self.now = 0
        """How many births and deaths there have been."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and note the storages of its result."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # It comes back with the local tensors.
        if func is torch.ops.prim.device.default:
            return func(*args)  # Asked of every tensor at every turn.
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
                self._note(value.untyped_storage())
        return out

    def __enter__(self) -> "AllocationTracker":
        """Watch operators, and resizes: FSDP2 frees and takes storages so, which is no operator."""
        resize = self._resize = torch.UntypedStorage.resize_

        def watched_resize(storage: torch.UntypedStorage, size: int) -> None:
            self._record_free(storage._cdata)
            resize(storage, size)
            self._note(storage)

        torch.UntypedStorage.resize_ = watched_resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop watching."""
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def move(self, sources: Collection[str], target: str) -> None:
        """Let what is alive of the parts `sources` belong to `target`, from its birth on."""
        for allocation in self._alive.values():
            if allocation.part in sources:
                allocation.part = target

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if not size or key in self._alive or (part := self._part()) is None:
            return
        self._alive[key] = Allocation(part, size, self.now)
        self.allocations.append(self._alive[key])
        weakref.finalize(storage, self._record_free, key)
        self.now += 1

    def _record_free(self, key: int) -> None:
        if allocation := self._alive.pop(key, None):
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
    """The most that was alive at once."""

    parts: Mapping[str, int]
    """{part: bytes} at the moment when all parts together were largest."""
    highest: Mapping[str, int]
    """{part: bytes} of each part at its own largest moment."""

    @property
    def total(self) -> int:
        """Bytes of all parts at the peak."""
        return sum(self.parts.values())


def find_peak(allocations: Collection[Allocation], since: int = 0) -> Peak:
    """Replay births and deaths from the first on, and return the moment with the most from `since`.

    Args:
        allocations: What a tracker noted.
        since: A place among births and deaths, as `AllocationTracker.now` counts them.
    """
    changes = [(a.begin, a.part, a.size) for a in allocations]
    changes += [(a.end, a.part, -a.size) for a in allocations if a.end is not None]
    now, highest, at_peak, total, most = Counter[str](), Counter[str](), Counter[str](), 0, 0
    for place, part, change in sorted(changes):
        now[part] += change
        total += change
        if place < since:
            highest, at_peak, most = now.copy(), now.copy(), total
        highest[part] = max(highest[part], now[part])
        if total > most:
            most, at_peak = total, now.copy()
    return Peak(at_peak, highest)
