"""How fast training goes: tokens, floating-point operations, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from models.config import LlamaConfig
from models.flops import train_flops_per_token
from train.runtime import Runtime
from train.titan import get_peak_flops


class Throughput:
    """Counts work over all ranks, and the time it took."""

    def __init__(self, model: LlamaConfig, seq_len: int, runtime: Runtime) -> None:
        """Start the clock."""
        self._model, self._seq_len, self._runtime = model, seq_len, runtime
        self._peak_flops = None
        if runtime.device.type == "cuda":
            self._peak_flops = get_peak_flops(runtime.device_name()) * runtime.world_size
        self._tokens, self._flops, self._begin = 0, 0.0, time.perf_counter()

    def add(self, tokens: int, *, mean_layers: float, num_exits: int) -> None:
        """Count `tokens` that ran through `mean_layers` layers and `num_exits` heads each."""
        self._tokens += tokens
        self._flops += tokens * train_flops_per_token(
            self._model, self._seq_len, mean_layers=mean_layers, mean_exits=num_exits
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the `with` block out: it is not training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Return the rates since the last reading, and start again."""
        seconds = time.perf_counter() - self._begin
        rates = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/gflops_per_second": self._flops / seconds / 1e9,
            "perf/peak_memory_gib": self._runtime.peak_memory_bytes() / 2**30,
        }
        if self._peak_flops is not None:
            rates["perf/mfu"] = self._flops / seconds / self._peak_flops
        self._tokens, self._flops, self._begin = 0, 0.0, time.perf_counter()
        return rates
