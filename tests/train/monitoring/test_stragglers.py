"""The rank that the others wait for is named, wherever it is slow; noise is not."""

import inspect
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor

from models.config import LlamaConfig
from models.host_copy import HostCopy
from tests.distributed import run_distributed
from train.monitoring.main_thread import innermost_line, waits
from train.monitoring.stragglers import (
    StragglerConfig,
    StragglerWatch,
    WorkTime,
    find_stragglers,
    probe_seconds,
)
from train.optimizer.optim import OptimConfig, build_optimizer
from train.parallel.parallelize import ParallelConfig, build_model

CONFIG = StragglerConfig()


def own(total=5.0, **seconds):
    return WorkTime(seconds, {"data": "data/loader.py:88 (batch)"}, total)


def test_the_slow_one_of_two_is_named_with_its_section_and_line():
    lines = find_stragglers([own(data=3.1, step=1.0), own(data=0.1, step=1.1)], CONFIG, steps=10)
    assert lines == [
        "stragglers: rank 0 is slow in data: 0.310 s/step of its own, 31.0 times the other ranks' "
        "median 0.010 s/step, mostly at data/loader.py:88 (batch)"
    ]


def test_the_median_of_the_others_decides_among_many():
    ranks = [own(step=2.0), own(step=1.9), own(step=4.0), own(step=2.1)]
    lines = find_stragglers(ranks, CONFIG, steps=10)
    assert len(lines) == 1
    assert "rank 2 is slow in step: 0.400 s/step of its own, 2.0 times" in lines[0]
    assert "median 0.200 s/step, mostly at no line of ours" in lines[0]


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (own(step=2.9), own(step=2.0)),  # less than the ratio
        (own(step=0.6), own(step=0.2)),  # more than the ratio, but 0.4 s of 5 s
        (own(total=0.5, step=0.24), own(total=0.5, step=0.0)),  # half the time, but 0.24 s
        (own(step=2e-5), own(step=1e-6)),
        (own(log=4.0, setup=4.0), own(log=0.1, setup=0.0)),  # not compared
    ],
)
def test_noise_is_not_named(slow, fast):
    assert find_stragglers([slow, fast], CONFIG, steps=10) == []
    assert find_stragglers([fast, slow, fast], CONFIG, steps=10) == []


def test_a_slow_device_is_named():
    lines = find_stragglers([own(probe=1e-3), own(probe=1e-3), own(probe=2e-3)], CONFIG, steps=10)
    assert len(lines) == 1
    assert "the device of rank 2 is slow: 2.0 ms for a fixed computation, 2.0 times" in lines[0]


def test_the_probe_takes_time():
    assert 1e-5 < probe_seconds(torch.device("cpu")) < 1


def called(function):
    """Return a stack, here above the caller's, that is inside a function of that file and name."""
    code = function.__code__
    scope = {"sys": sys}
    source = f"def {code.co_name}():\n    return sys._getframe()"
    exec(compile(source, code.co_filename, "exec"), scope)
    return scope[code.co_name]()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (dist.all_reduce, True),
        (torch.cuda.Event.synchronize, True),
        (torch.cuda.Stream.synchronize, True),
        (torch.cuda.synchronize, True),
        (torch.cuda.current_stream, False),
        (HostCopy.read, False),  # already on the host
        (distribute_tensor, False),
    ],
)
def test_a_rank_waits_in_a_collective_and_for_its_device(function, expected):
    assert waits(called(inspect.unwrap(function))) is expected


def test_a_stack_has_a_line():
    frame = sys._getframe()
    assert not waits(frame)
    assert innermost_line(frame).startswith("tests/train/monitoring/test_stragglers.py:")
    assert innermost_line(frame).endswith("(test_a_stack_has_a_line)")


MODEL = LlamaConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32, vocab_size=50, max_seq_len=16
)
NAP_SECONDS = 0.1


class Trainer:
    """A bare training loop in which rank 1 naps somewhere."""

    def __init__(self, runtime, nap_in):
        self.runtime, self.nap_in, self.section = runtime, nap_in, "setup"
        self.model = build_model(MODEL, ParallelConfig(shard="blocks"), runtime, seed=0)
        self.optimizer = build_optimizer(self.model, OptimConfig(lr=1e-3))
        inner = self.model.layers["1"].feed_forward
        inner.register_forward_pre_hook(lambda *_: self.nap("forward"))
        inner.w1.register_full_backward_pre_hook(lambda *_: self.nap("backward"))

    def nap(self, where):
        if where == self.nap_in and self.runtime.rank == 1:
            time.sleep(NAP_SECONDS)

    def run(self, steps):
        """Train; return {done steps: alarms}."""
        config = StragglerConfig(interval_steps=10, min_seconds=0.5)
        watch = StragglerWatch(config, self.runtime, lambda: self.section, done_steps=0)
        tokens, found = torch.arange(16)[None], {}
        for t in range(steps):
            self.section = "data"
            self.nap("data")
            self.section = "step"
            self.model(tokens, exit_layers=[1]).exits[1].square().mean().backward()
            self.nap("optimizer")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.section = "log"
            if watch.due(t + 1):
                found[t + 1] = watch.read(t + 1)
        watch.close()
        return found


def check_naps(runtime):
    assert all(not lines for lines in Trainer(runtime, "nowhere").run(40).values())
    for nap_in in ("data", "forward", "backward", "optimizer"):
        found = Trainer(runtime, nap_in).run(20)
        assert list(found) == [10, 20]
        assert found[10] == []
        assert len(found[20]) == 1, found
        section = "data" if nap_in == "data" else "step"
        assert f"stragglers: rank 1 is slow in {section}: " in found[20][0], found
        assert "mostly at tests/train/monitoring/test_stragglers.py:" in found[20][0]
        assert found[20][0].endswith("(nap)")
        assert runtime.gather(found[20]) == [found[20]] * runtime.world_size


def test_a_rank_that_naps_is_named_within_twenty_steps_wherever_it_naps():
    run_distributed(check_naps, 2)


def check_alone(runtime):
    threads = threading.active_count()
    watch = StragglerWatch(CONFIG, runtime, lambda: "step", done_steps=0)
    assert threading.active_count() == threads
    assert not watch.due(10)
    watch.close()


def test_a_rank_alone_is_not_watched():
    run_distributed(check_alone, 1)


def test_problems_name_the_field():
    assert StragglerConfig(interval_steps=0).problems() == []
    assert "stragglers.ratio" in StragglerConfig(ratio=1.0).problems()[0]
