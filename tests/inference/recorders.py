"""What stands in for a GPU: a recorder as forgetful as a CUDA graph, a watch over the device."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from inference.engine.batch import Round
from inference.engine.counters import Counters
from inference.engine.cuda_graphs import RoundGraphs

pytree.register_dataclass(Round)
DRAWS = (torch.ops.aten.exponential_.default, torch.ops.aten.uniform_.default)


class NoDraws(TorchDispatchMode):
    """Leaves out draws from a generator, which tensors without data have none of."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return args[0] if function in DRAWS else function(*args, **(kwargs or {}))


class OnDeviceAlone(NoDraws):
    """Refuses tensors of the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for value in pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                raise AssertionError(f"{function} takes or gives a tensor of the host")
        return result


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made of the host's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor), "a tensor of the host's numbers"
        return function(*args, **(kwargs or {}))


@contextmanager
def on_device_alone():
    with OnDeviceAlone(), NoNumbers():
        yield


class Rerunner:
    """Records by running, which stands for the first replay as well; replays by running again.

    What a later run does to the host's own numbers is undone, and its results are written into the
    tensors of the first.
    """

    def __init__(self):
        self.recorded = self.replayed = 0

    def record(self, run, state):
        self.recorded += 1
        static, first = run(), [True]

        def replay():
            self.replayed += 1
            if first:
                first.clear()
                return static
            max_position, counters = state.batch.max_position, state.counters
            state.counters = Counters()
            new = run()
            state.batch.max_position, state.counters = max_position, counters
            pairs = zip(pytree.tree_leaves(static), pytree.tree_leaves(new), strict=True)
            for old, now in pairs:
                if isinstance(old, Tensor):
                    old.copy_(now)
                else:
                    assert old == now, "a graph returns what the host had when it was captured"
            return static

        return replay

    def idle_bytes(self):
        return 2**40


def rerunning():
    """Return graphs, and the list of their recorders."""
    recorders = []

    def new_recorder():
        recorders.append(Rerunner())
        return recorders[-1]

    return RoundGraphs(new_recorder), recorders
