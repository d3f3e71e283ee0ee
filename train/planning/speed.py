"""The time of a step on 1 to 1,024 GPUs: computing at a stated MFU, and what FSDP2 sends.

A model of three terms, not a measurement: products at a share of the GPU's peak, collectives by
NCCL's own model of a ring, and which of these hide behind computing. Numbers alone: no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

REACHED = 0.8
"""Share of a link's bandwidth on paper that large collectives reach: 360 of 450 GB/s is usual for
NVLink of an H100 in nccl-tests (its PERFORMANCE.md defines the bus bandwidth meant)."""
BASE_SECONDS, NVLINK_HOP_SECONDS, NETWORK_HOP_SECONDS = 8.4e-6, 3.4e-6, 14.0e-6
"""Latency of a ring, of its steps inside a node and of those between nodes, protocol Simple: the
constants of NCCL's src/graph/tuning.cc."""


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says of a GPU."""

    peak: float
    """FLOP/s in bfloat16, without sparsity."""
    memory_gib: float
    nvlink: float
    """Bytes per second to the other GPUs of its node, in each direction."""


GPUS = {
    "A100": Gpu(312e12, 80.0, 300e9),
    "H100": Gpu(989e12, 80.0, 450e9),
    "H200": Gpu(989e12, 140.0, 450e9),
    "B200": Gpu(2250e12, 180.0, 900e9),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, each with a network adapter of its own."""

    gpu: Gpu
    per_node: int
    network: float
    """Bytes per second of each GPU's network adapter, in each direction."""

    def ring_seconds(self, whole: float, calls: float, n: int, stride: int = 1) -> float:
        """Return the time of all-gathers or reduce-scatters over a group of n ranks.

        NCCL's ring (src/graph/tuning.cc): (n - 1) / n of the bytes through the slowest link, and
            calls * (base + (n - m) * hop in a node + (m - 1) * hop between nodes)
        over m nodes. A ring between nodes uses the adapters of all the group's GPUs in a node.

        Args:
            whole: Bytes of the larger of input and output, summed over calls.
            calls: Number of collectives.
            n: Ranks of the group.
            stride: Distance of its ranks, 1 where they are neighbours.
        """
        if n == 1:
            return 0.0
        inside = max(1, min(n, self.per_node // stride))
        nodes = -(-n // inside)
        link = self.gpu.nvlink if nodes == 1 else min(self.gpu.nvlink, inside * self.network)
        hops = (n - nodes) * NVLINK_HOP_SECONDS + (nodes - 1) * NETWORK_HOP_SECONDS
        return whole * (n - 1) / n / (REACHED * link) + calls * (BASE_SECONDS + hops)


@dataclass(frozen=True)
class Traffic:
    """What one rank gathers and reduces, bytes of the larger side and number of collectives."""

    gathers: tuple[float, float]
    """All-gathers of the blocks in one pass."""
    root_gather: tuple[float, float]
    """The root's all-gather, which begins a step."""
    reduces: tuple[float, float]
    """Reduce-scatters of a microbatch that reduces."""
    all_reduces: tuple[float, float]
    """All-reduces over the replicas, once a step."""
    resharded: bool
    """Whether blocks are gathered for every forward and backward pass, not once a step."""
    root_share: float
    """The root unit's share of the weights: its reduction ends a step."""
    overlaps: bool
    """Whether all-reduces hide behind the backward pass; the one sum of plain weights does not."""
    reduces_all: bool
    """Whether every microbatch reduces, not the last alone."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    communication: float
    exposed: float
    """The part of the communication that is not hidden behind computing."""

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return self.compute + self.exposed


def traffic(
    sent: Mapping[str, float],
    *,
    n_layers: int,
    microbatches: int,
    reduces_all: bool,
    resharded: bool,
    root_share: float,
    whole: bool = False,
) -> Traffic:
    """Return the traffic of the passes of a step; a layer and the root are units.

    Args:
        sent: {collective: bytes of the larger side} of one rank in a whole step.
        n_layers: Layers of the model.
        microbatches: Those of that step.
        reduces_all: See Traffic.
        resharded: See Traffic.
        root_share: See Traffic.
        whole: Whether every rank holds plain weights, whose gradients are summed at once.
    """

    def of(kind: str) -> float:
        return sum(size for name, size in sent.items() if kind in name)

    units = n_layers + 1
    passes = 2 * microbatches if resharded else 1
    weights = of("allgather") / (root_share + passes * (1 - root_share))
    return Traffic(
        gathers=(weights * (1 - root_share), n_layers),
        root_gather=(weights * root_share, 1),
        reduces=(of("reduce_scatter") / (microbatches if reduces_all else 1), units),
        all_reduces=(of("allreduce"), 1 if whole else units),
        resharded=resharded,
        root_share=root_share,
        overlaps=not whole,
        reduces_all=reduces_all,
    )


def step_time(
    cluster: Cluster,
    sent: Traffic,
    *,
    flops: float,
    mfu: float,
    ranks: int,
    replicate: int,
    microbatches: int,
) -> StepTime:
    """Return the time of a step: in each pass, the longer of computing and communication.

    Forward takes 1/3 of a microbatch's computing and backward 2/3 (6 FLOPs per weight: 2 and 4).
    What FSDP2 prefetches hides behind the pass it runs in; the root's gather before the step and
    its reduction after it hide behind nothing.

    Args:
        cluster: The machines.
        sent: The traffic of one rank.
        flops: FLOPs of one rank in a step.
        mfu: Share of the peak that computing reaches while nothing waits for communication.
        ranks: All GPUs.
        replicate: ParallelConfig.dp_replicate.
        microbatches: Microbatches of a rank in a step.
    """
    shard = ranks // replicate
    compute = flops / (mfu * cluster.gpu.peak)
    forward, backward = compute / microbatches / 3, compute / microbatches * 2 / 3
    root_gather = cluster.ring_seconds(*sent.root_gather, shard)
    gather = cluster.ring_seconds(*sent.gathers, shard)
    reduce = cluster.ring_seconds(*sent.reduces, shard)
    # An all-reduce is a reduce-scatter and an all-gather.
    all_reduce = 2 * cluster.ring_seconds(*sent.all_reduces, replicate, stride=shard)
    gathering, again = (microbatches, gather) if sent.resharded else (1, 0.0)
    reducing = microbatches if sent.reduces_all else 1
    root_reduce = reduce * sent.root_share
    exposed = root_gather + gathering * max(0.0, gather - forward)
    exposed += (microbatches - reducing) * max(0.0, again - backward)
    exposed += (reducing - 1) * max(0.0, again + reduce - backward)
    last = again + reduce - root_reduce + all_reduce * sent.overlaps
    exposed += root_reduce + all_reduce * (not sent.overlaps) + max(0.0, last - backward)
    communication = root_gather + gathering * gather + microbatches * again
    communication += reducing * reduce + all_reduce
    return StepTime(compute, communication, exposed)
