"""Time and memory of the loss of K exits, beside the products it cannot do without.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/exit_loss.py --json benchmarks/exit_loss.json

A head and a softmax need three products per exit: logits, gradient of the hidden states, gradient
of the head. `ratio` is the median over rounds of an arm's time over theirs in the same round, where
arms take turns; `peak_mib` is what torch's allocator held at most beside inputs and gradients,
which every loss has. Arms: ours; plain, F.cross_entropy of whole logits; torchtune's way, the same
on 8 chunks of the hidden states; F.linear_cross_entropy where this torch has it.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from data.command_line import run_command
from inference.cli.arguments import Count, OutputFile
from inference.loading.machine import machine
from loss.cross_entropy import ExitTokens, weighted_cross_entropy_sums


class Case(NamedTuple):
    """Tokens, width of the hidden states, and tokens of the vocabulary."""

    rows: int
    dim: int
    vocab_size: int


CASES = {
    "full": (Case(2048, 128, 2048), Case(1024, 768, 32000), Case(512, 2048, 32000)),
    "tiny": (Case(64, 16, 512), Case(32, 32, 1000)),
}
TORCHTUNE_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the loss alone."""

    size: Literal["full", "tiny"] = "full"
    """tiny: a rehearsal of seconds."""
    exits: tuple[int, ...] = (1, 4)
    """Numbers of exits."""
    chunk_rows: Count = 4096
    """As early_exit.chunk_rows."""
    repeats: Count = 5
    """Rounds in which every arm has a turn, after one that measures memory."""
    json: OutputFile | None = None
    """Also write the numbers to this file."""


class Inputs(NamedTuple):
    """The inputs of a step with K exits."""

    hidden: list[Tensor]
    head: Tensor
    labels: Tensor
    weights: list[float]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the mean over tokens, and free them."""
        torch.autograd.grad(loss / len(self.labels), [*self.hidden, self.head])


def make_inputs(case: Case, exits: int) -> Inputs:
    """Draw inputs whose logits have a standard deviation of 1."""
    g = torch.Generator().manual_seed(0)
    hidden = [torch.randn(case.rows, case.dim, generator=g) for _ in range(exits)]
    head = torch.randn(case.vocab_size, case.dim, generator=g) / case.dim**0.5
    labels = torch.randint(case.vocab_size, (case.rows,), generator=g)
    weights = [1 / exits] * exits
    return Inputs([h.requires_grad_() for h in hidden], head.requires_grad_(), labels, weights)


@torch.no_grad()
def products(inputs: Inputs) -> None:
    """Do the three products of each exit, and nothing else."""
    for h in inputs.hidden:
        logits = h @ inputs.head.t()
        torch.mm(logits, inputs.head)
        torch.mm(logits.t(), h)


def sum_over_exits(inputs: Inputs, loss: Callable[[Tensor], Tensor]) -> None:
    """Take a step with the weighted sum of each exit's loss."""
    losses = [w * loss(h) for w, h in zip(inputs.weights, inputs.hidden, strict=True)]
    inputs.backward(torch.stack(losses).sum())


def plain(inputs: Inputs) -> None:
    """Keep whole logits of every exit until the backward pass."""
    head, labels = inputs.head, inputs.labels
    sum_over_exits(inputs, lambda h: F.cross_entropy(h @ head.t(), labels, reduction="sum"))


def torchtune(inputs: Inputs) -> None:
    """Chunk the hidden states as torchtune's LinearCrossEntropyLoss does."""
    labels = inputs.labels.chunk(TORCHTUNE_CHUNKS)

    def loss(hidden: Tensor) -> Tensor:
        chunks = zip(hidden.chunk(TORCHTUNE_CHUNKS), labels, strict=True)
        logits = ((h @ inputs.head.t(), some) for h, some in chunks)
        return sum(F.cross_entropy(z.float(), some, reduction="sum") for z, some in logits)

    sum_over_exits(inputs, loss)


def linear_cross_entropy(inputs: Inputs) -> None:
    """Use torch's own, new in 2.13."""
    head, labels = inputs.head, inputs.labels
    sum_over_exits(inputs, lambda h: F.linear_cross_entropy(h, head, labels, reduction="sum"))


def compare(options: Options) -> None:
    """Measure, print a table, and write the numbers down."""
    print("| rows, dim, vocabulary | K | arm | ms | ratio | peak MiB |")
    print("|---|---:|---|---:|---:|---:|")
    found = []
    for case in CASES[options.size]:
        for exits in options.exits:
            found.append({**case._asdict(), "exits": exits, "arms": measure(case, exits, options)})
            for name, arm in found[-1]["arms"].items():
                print(
                    f"| {', '.join(map(str, case))} | {exits} | {name} | "
                    f"{1e3 * arm['seconds']:.1f} | {arm['ratio']:.3f} | {arm['peak_mib']:.0f} |",
                    flush=True,
                )
    if options.json is not None:
        content = {"machine": machine(), "load_average": os.getloadavg()[0]}
        content |= {"repeats": options.repeats, "chunk_rows": options.chunk_rows, "cases": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def measure(case: Case, exits: int, options: Options) -> dict[str, dict[str, float]]:
    """Return the seconds, ratio to the products and peak memory of every arm."""
    inputs = make_inputs(case, exits)

    def ours(inputs: Inputs) -> None:
        terms = zip(inputs.hidden, inputs.weights, strict=True)
        total, _ = weighted_cross_entropy_sums(
            [ExitTokens(h, inputs.labels, w) for h, w in terms],
            inputs.head,
            chunk_rows=options.chunk_rows,
        )
        inputs.backward(total)

    arms = [products, ours, plain, torchtune]
    if "linear_cross_entropy" in dir(F):
        arms.append(linear_cross_entropy)
    peaks = {arm.__name__: peak_mib(arm, inputs) for arm in arms}
    seconds: dict[str, list[float]] = {name: [] for name in peaks}
    for repeat in range(options.repeats):
        for arm in arms if repeat % 2 == 0 else reversed(arms):
            begin = time.perf_counter()
            arm(inputs)
            seconds[arm.__name__].append(time.perf_counter() - begin)
    rounds = {name: zip(seconds[name], seconds["products"], strict=True) for name in seconds}
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(each / floor for each, floor in rounds[name]),
            "peak_mib": peaks[name],
        }
        for name in seconds
    }


def peak_mib(arm: Callable[[Inputs], None], inputs: Inputs) -> float:
    """Run an arm and return what torch's allocator held at most beside inputs and gradients."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        arm(inputs)
    balance = highest = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            balance += event.nbytes()
            highest = max(highest, balance)
    gradients = sum(each.nbytes for each in (*inputs.hidden, inputs.head))
    return max(highest - gradients, 0) / 2**20


if __name__ == "__main__":
    run_command(Options, compare, prog="benchmarks/exit_loss.py")
