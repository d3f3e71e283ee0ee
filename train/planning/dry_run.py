"""The plan of a run for --dry_run: its sizes, its memory and its work.

Needs one process, and neither weights nor data nor GPUs.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from models.flops import (
    block_params,
    own_exit_params,
    router_params,
    total_params,
    train_flops_per_token,
)
from models.llama import Llama
from train.checkpoints.content import tensor_bytes
from train.config.command_line import DryRun
from train.config.config import TrainConfig
from train.loop.layerskip import StepPlan
from train.parallel.parallelize import freeze
from train.planning.memory import Need, Work, measure
from train.planning.speed import GPUS
from train.planning.speed_rows import speed_rows

logger = logging.getLogger(__name__)

GIB = 2**30
RESERVE = 0.05
"""Share of a GPU's memory left to the CUDA context, NCCL's buffers and fragmentation."""
LABELS = {
    "parameters": "parameters (fp32)",
    "moments": "moments (fp32)",
    "average": "average of weights (fp32)",
    "gradients": "gradients, reduced",
    "unreduced gradients": "gradients, not yet reduced",
    "gathered weights": "gathered weights and buffers",
    "activations": "activations",
    "loss and head": "loss and head",
    "backward": "backward pass",
    "update": "optimizer's update",
    "other": "other",
}
"""{part: its label in the plan}, in the plan's order."""
STATE = ("parameters", "moments", "average", "gradients")
STATE_LABEL = "parameters, gradients and moments"


def plan_run(config: TrainConfig, machine: DryRun, *, by_tokens: bool = False) -> str:
    """Return the plan of a run on a machine, to be printed.

    Args:
        config: The run.
        machine: What it is planned for.
        by_tokens: Whether --tokens has decided its steps.

    Raises:
        ValueError: If the configuration is invalid, does not divide among the ranks or does not
            fit into their memory.
    """
    if found := machine.problems():
        raise ValueError("\n".join(found))
    config.check(machine.ranks)
    steps = [config.layerskip.at(t) for t in range(config.steps)]
    work = worst_work(config, steps, machine.ranks)
    logger.info("plan: a training step is run without data, which takes up to a minute")
    need = measure(work, on_gpu=True)
    if need.device.total > _memory_gib(machine) * GIB * (1 - RESERVE):
        raise ValueError(_too_large(config, work, need, machine))
    return "\n".join(
        [
            f"{config.name} on {machine.ranks} GPUs",
            *_rows(_sizes(config, work, by_tokens)),
            *_rows(_amounts(config, steps, work, need)),
            *speed_rows(config, work, need.collective_bytes, machine, mean_flops(config, steps)[2]),
            *_memory(work, need, machine),
        ]
    )


def worst_work(config: TrainConfig, steps: Sequence[StepPlan], ranks: int) -> Work:
    """Return the work of a rank in the step with the most exits, without layer dropout."""
    worst = max(steps, key=lambda step: len(step.exit_layers))
    rows = config.data.rows_at_once(ranks)
    return Work(
        model=config.model,
        parallel=config.parallel.settled(config.model, ranks, on_gpu=True),
        step=config.step_config,
        plan=replace(worst, drop_prob=(0.0,) * config.model.n_layers),
        rows=rows,
        seq_len=config.data.seq_len,
        microbatches=config.data.global_batch_size // (rows * ranks),
        ranks=ranks,
    )


def _sizes(config: TrainConfig, work: Work, by_tokens: bool) -> Iterator[tuple[str, str]]:
    model, data = config.model, config.data
    total, own = total_params(model), own_exit_params(model)
    layer = block_params(model) + router_params(model)
    replicate = work.parallel.dp_replicate
    yield (
        "parameters",
        f"{total:,}: {model.n_layers} layers of {layer:,}, "
        f"embeddings and head {total - own - model.n_layers * layer:,}"
        + (f", exits' own parts {own:,}" if own else ""),
    )
    trained = own if config.optim.trains == "exits" else total
    if trained < total:
        yield "learn", f"{trained:,} of them, the exits' own parts"
    yield "mesh", f"{replicate} replicate x {work.ranks // replicate} shard"
    yield (
        "step",
        f"{data.tokens_per_step:,} tokens: {data.global_batch_size} sequences of {data.seq_len}, "
        f"{work.microbatches} x {work.rows} on each GPU (microbatches x sequences)",
    )
    if data.ramp_start:
        yield (
            "batch",
            f"from {data.ramp_start} sequences, {data.ramp_increment} more at a time, to "
            f"{data.global_batch_size} at step {data.ramp_steps}",
        )
    yield from _budget(config, by_tokens)
    with torch.device("meta"):
        whole = Llama(model)
    freeze(whole, config.optim.trains)
    disk = tensor_bytes(whole, config.optim)
    yield "checkpoint", f"{_bytes(disk)} on disk (parameters and moments, fp32)"


def _budget(config: TrainConfig, by_tokens: bool) -> Iterator[tuple[str, str]]:
    """Yield steps and tokens of the run, and which of them another batch would change."""
    data, tokens = config.data, config.data.tokens_of(config.steps)
    batch = "" if data.ramp_start else f" x {data.tokens_per_step:,}"
    yield "run", f"{config.steps:,} steps{batch} = {tokens:,} tokens"
    fixed = "--tokens sets the steps: another batch or seq_len keeps the tokens"
    free = f"another batch or seq_len changes the tokens; --tokens {tokens} keeps them"
    yield "", fixed if by_tokens else free


def mean_flops(config: TrainConfig, steps: Sequence[StepPlan]) -> tuple[float, float, float]:
    """Return the FLOPs to train on a token: plainly, with exits, with layer dropout too."""
    L, frozen = config.model.n_layers, config.optim.trains == "exits"
    layers, exits = _means(steps)
    own = sum(step.num_own_exits(config.model) for step in steps) / len(steps)

    def flops(mean_layers: float, mean_exits: float, mean_own: float) -> float:
        return train_flops_per_token(
            config.model,
            config.data.seq_len,
            mean_layers=mean_layers,
            mean_exits=mean_exits,
            capacity=config.router.capacity,
            mean_own_exits=mean_own,
            frozen=frozen,
        )

    return flops(L, 1, 0), flops(L, exits, own), flops(layers, exits, own)


def _means(steps: Sequence[StepPlan]) -> tuple[float, float]:
    """Return the layers and exits of a step, on average."""
    layers = sum(step.mean_layers for step in steps) / len(steps)
    return layers, sum(step.mean_exits for step in steps) / len(steps)


def _amounts(
    config: TrainConfig, steps: Sequence[StepPlan], work: Work, need: Need
) -> Iterator[tuple[str, str]]:
    L, frozen = config.model.n_layers, config.optim.trains == "exits"
    layers, exits = _means(steps)
    plain, with_exits, recipe = mean_flops(config, steps)
    yield (
        "FLOPs per token",
        f"{_flops(recipe)} on average: {layers:.2f} of {L} layers, {exits:.2f} exits",
    )
    if not frozen:
        text = f"{_flops(with_exits)} without layer dropout, {_flops(plain)} without exits either"
        yield "", text
    per_gpu = recipe * config.data.tokens_per_step / work.ranks
    yield "FLOPs per step", f"{_flops(per_gpu)} on each GPU, not counting recomputation"
    yield (
        "sent per step",
        f"{_bytes(_sent_bytes(work, need))} by each GPU, to gather weights and reduce gradients",
    )


def _sent_bytes(work: Work, need: Need) -> float:
    """Return the bytes that one rank sends in a step: (n - 1) / n of each whole in a ring of n."""
    replicate = work.parallel.dp_replicate
    shard, sent = work.ranks // replicate, 0.0
    for name, whole in need.collective_bytes.items():
        rounds, n = (2, replicate) if name.startswith("allreduce") else (1, shard)
        sent += rounds * whole * (n - 1) / n
    return sent


def _memory_gib(machine: DryRun) -> float:
    """Return the memory of each GPU: what is given, or that of its kind."""
    return machine.memory_gib or GPUS[machine.gpu].memory_gib


def _memory(work: Work, need: Need, machine: DryRun) -> Iterator[str]:
    exits = len(work.plan.exit_layers)
    yield f"memory of each GPU in the largest step, of {exits} exits and no layer dropped:"
    yield f"  {'':30s}{'at the peak':>14s}{'at most':>14s}"
    for part, label in LABELS.items():
        if most := need.device.highest.get(part, 0):
            yield f"  {label:30s}{_bytes(need.device.parts[part]):>14s}{_bytes(most):>14s}"
    yield f"  {'all':30s}{_bytes(need.device.total):>14s}"
    if need.host_bytes:
        yield f"  {'in host memory':30s}{_bytes(need.host_bytes):>14s}"
    yield (
        f"  A GPU has {_memory_gib(machine):g} GiB; {RESERVE:.0%} are reserved for CUDA, NCCL and "
        "fragmentation. Without compile and float8."
    )


def _bytes(number: float) -> str:
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"


def _flops(number: float) -> str:
    scale, prefix = next(
        (s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if number >= s or p == "M"
    )
    return f"{number / scale:.2f} {prefix}"


def _rows(pairs: Iterator[tuple[str, str]]) -> Iterator[str]:
    return (f"{name:18s}{value}" for name, value in pairs)


def _too_large(config: TrainConfig, work: Work, need: Need, machine: DryRun) -> str:
    """Return the error of a run that does not fit: its largest part, and the settings to change."""
    parts = {
        STATE_LABEL: sum(need.device.parts[part] for part in STATE),
        **{LABELS[part]: need.device.parts[part] for part in LABELS if part not in STATE},
    }
    label, largest = max(parts.items(), key=lambda item: item[1])
    usable = _memory_gib(machine) * GIB * (1 - RESERVE)
    return (
        f"memory_gib: {_memory_gib(machine):g} leave {_bytes(usable)} but each of {machine.ranks} "
        f"GPUs needs {_bytes(need.device.total)}, {_bytes(largest)} of it for {label}; "
        f"try {', '.join(_levers(config, work, label))}"
    )


def _levers(config: TrainConfig, work: Work, label: str) -> Iterator[str]:
    """Yield settings that would reduce a part of the memory and are not set yet."""
    parallel = config.parallel
    if label == LABELS["unreduced gradients"]:
        if not parallel.reduce_every_microbatch:
            yield "parallel.reduce_every_microbatch True"
        yield "a larger data.microbatch_size"
    elif label == STATE_LABEL:
        if parallel.dp_replicate > 1:
            yield "a smaller parallel.dp_replicate"
        if not parallel.cpu_offload:
            yield "parallel.cpu_offload True"
        yield "more ranks"
    elif label == LABELS["gathered weights"]:
        if not parallel.reshard_after_forward:
            yield "parallel.reshard_after_forward True"
    else:
        if label == LABELS["loss and head"]:
            yield f"an early_exit.chunk_rows below {config.early_exit.chunk_rows}"
        elif parallel.activation_checkpointing != "full":
            yield "parallel.activation_checkpointing full"
        if work.rows > 1:
            yield f"a data.microbatch_size below {work.rows}"
        yield f"a data.seq_len below {work.seq_len}"
    yield "GPUs with more memory"
