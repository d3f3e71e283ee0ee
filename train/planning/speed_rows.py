"""The expected speed of a run, as rows of its plan: on the GPUs asked for, and on 1 to 1,024."""

from collections.abc import Iterator, Mapping

from models.flops import block_params, own_exit_params, router_params, total_params
from train.config.command_line import DryRun
from train.config.config import TrainConfig
from train.planning.memory import Work
from train.planning.speed import GPUS, REACHED, Cluster, Traffic, step_time, traffic

MOST_GPUS = 1024
DAY_SECONDS = 86400.0


def speed_rows(
    config: TrainConfig,
    work: Work,
    sent: Mapping[str, float],
    machine: DryRun,
    flops_per_token: float,
) -> Iterator[str]:
    """Yield what the speed rests on, and a row for each number of GPUs that the batch divides by.

    Args:
        config: The run.
        work: The work of a rank in the plan.
        sent: {collective: bytes of the larger side} of a rank in its step.
        machine: What the plan is for.
        flops_per_token: On average over the run.
    """
    gpu = GPUS[machine.gpu]
    cluster = Cluster(gpu, machine.gpus_per_node, machine.network_gb * 1e9)
    yield (
        f"expected speed if computing reaches {machine.mfu:.0%} (--mfu) of an {machine.gpu}'s "
        f"{gpu.peak / 1e12:,.0f} TFLOP/s,"
    )
    yield (
        f"{machine.gpus_per_node} GPUs a node, {REACHED:.0%} of {gpu.nvlink / 1e9:.0f} GB/s between"
        f" them and of {machine.network_gb:g} GB/s each across:"
    )
    yield (
        f"  {'GPUs':>5s}{'computing':>12s}{'sending':>11s}{'not hidden':>12s}{'tokens/s':>14s}"
        f"{'MFU':>7s}{'days':>9s}{'GPU-days':>10s}"
    )
    one = _traffic(config, work, sent)
    for ranks in sorted({work.ranks} | _others(config, work)):
        replicate = ranks if _whole(work) else config.parallel.dp_replicate
        yield _row(config, cluster, one, machine, ranks, replicate, flops_per_token)


def _others(config: TrainConfig, work: Work) -> set[int]:
    """Return numbers of GPUs, up to the most, that batch and replicas divide by."""
    whole, replicate, found = _whole(work), work.parallel.dp_replicate, set()
    for ranks in (1, 8, 32, 128, 512, MOST_GPUS):
        rows = config.data.microbatch_size or 1
        fits = config.data.global_batch_size % (ranks * rows) == 0
        # One rank alone sends nothing, so the bytes of others cannot be told from it.
        known = work.ranks > 1 if whole else work.ranks // replicate > 1
        if fits and (whole or ranks % replicate == 0) and known:
            found.add(ranks)
    return found


def _traffic(config: TrainConfig, work: Work, sent: Mapping[str, float]) -> Traffic:
    model = config.model
    blocks = model.n_layers * (block_params(model) + router_params(model))
    weights = total_params(model) - own_exit_params(model)
    return traffic(
        sent,
        n_layers=model.n_layers,
        microbatches=work.microbatches,
        reduces_all=config.parallel.reduce_every_microbatch,
        resharded=config.parallel.reshard_after_forward,
        root_share=1 - blocks / weights,
        whole=_whole(work),
    )


def _whole(work: Work) -> bool:
    return work.parallel.shard == "none"


def _row(
    config: TrainConfig,
    cluster: Cluster,
    sent: Traffic,
    machine: DryRun,
    ranks: int,
    replicate: int,
    flops_per_token: float,
) -> str:
    data = config.data
    tokens = data.tokens_per_step
    time = step_time(
        cluster,
        sent,
        flops=flops_per_token * tokens / ranks,
        mfu=machine.mfu,
        ranks=ranks,
        replicate=replicate,
        microbatches=data.global_batch_size // (data.rows_at_once(ranks) * ranks),
    )
    speed = tokens / time.total
    reached = flops_per_token * speed / ranks / cluster.gpu.peak
    days = data.tokens_of(config.steps) / speed / DAY_SECONDS
    return (
        f"  {ranks:5,d}{time.compute:10.3f} s{time.communication:9.3f} s"
        f"{time.exposed / time.total:12.1%}{speed:14,.0f}{reached:7.1%}{days:9.2f}"
        f"{days * ranks:10.2f}"
    )
