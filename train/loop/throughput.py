"""Throughput of training: tokens, floating-point operations, peak memory."""

from models.config import LlamaConfig
from models.flops import train_flops_per_token
from train.loop.layerskip import StepPlan
from train.parallel.parallelize import Trains
from train.parallel.runtime import Runtime
from train.parallel.titan import get_peak_flops


class Throughput:
    """Counts tokens and FLOPs over all ranks."""

    def __init__(
        self,
        model: LlamaConfig,
        seq_len: int,
        runtime: Runtime,
        *,
        capacity: float = 1.0,
        trains: Trains = "all",
    ) -> None:
        """Start to count, for a model of this shape and router capacity."""
        self._capacity = capacity
        self._model, self._seq_len, self._runtime = model, seq_len, runtime
        self._frozen = trains == "exits"
        self._peak_flops = None
        if runtime.device.type == "cuda":
            self._peak_flops = get_peak_flops(runtime.device_name()) * runtime.world_size
        self._tokens, self._flops = 0, 0.0

    def add(self, tokens: int, plan: StepPlan) -> None:
        """Count a step of `tokens` that ran the layers and exits of its plan."""
        self._tokens += tokens
        self._flops += tokens * train_flops_per_token(
            self._model,
            self._seq_len,
            mean_layers=plan.mean_layers,
            mean_exits=plan.mean_exits,
            mean_own_exits=plan.num_own_exits(self._model),
            frozen=self._frozen,
            capacity=self._capacity,
        )

    def read(self, seconds: float) -> dict[str, float]:
        """Return the rates over the `seconds` since the last reading, and reset the counts."""
        rates = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/gflops_per_second": self._flops / seconds / 1e9,
            "perf/peak_memory_gib": self._runtime.peak_memory_bytes() / 2**30,
        }
        if self._peak_flops is not None:
            rates["perf/mfu"] = self._flops / seconds / self._peak_flops
        self._tokens, self._flops = 0, 0.0
        return rates
