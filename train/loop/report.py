"""Reports of training: the means since the last log line, as metrics and as one line."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from train.loop.layerskip import StepPlan
from train.loop.step_metrics import StepMetrics
from train.loop.throughput import Throughput


class StepReport:
    """Accumulates the metrics of steps until a log line is due."""

    def __init__(self, L: int, throughput: Throughput, *, routed: bool) -> None:
        """Report on a model of L layers, with its router density if it is `routed`."""
        self._L, self._throughput = L, throughput
        self._routed = routed
        self._steps: list[StepMetrics] = []

    def add(self, step: StepMetrics, plan: StepPlan, *, tokens: int) -> None:
        """Add one step of so many tokens, and its plan."""
        self._steps.append(step)
        self._plan = plan
        self._throughput.add(tokens, plan)

    def read(self, tokens: int, *, lr: float, seconds: float, waited: float) -> dict[str, float]:
        """Return the means since the last reading, over the steps that updated the weights.

        Args:
            tokens: Tokens read by all steps so far.
            lr: Learning rate of the last step.
            seconds: Time since the last reading.
            waited: The part of it that this rank waited for data.
        """
        updates = [step for step in self._steps if step.updated]
        metrics = {
            "optim/lr": lr,
            "layerskip/p_max_t": max(self._plan.drop_prob),
            "layerskip/mean_layers": self._plan.mean_layers,
            "layerskip/num_exits": float(len(self._plan.exit_layers)),
            **_drop_probs(self._plan.drop_prob),
            "progress/tokens": float(tokens),
            "progress/skipped_updates": float(len(self._steps) - len(updates)),
            **self._throughput.read(seconds),
            "perf/data_wait": waited / seconds,
        }
        if updates:
            by_exit = {
                l: [step.exit_losses[l] for step in updates if l in step.exit_losses]
                for l in range(self._L)
            }
            means = {l: fmean(losses) for l, losses in by_exit.items() if losses}
            metrics |= {
                "train/J": fmean(step.J for step in updates),
                **exit_metrics("train", means, self._L),
                "optim/grad_norm": updates[-1].grad_norm,
            }
            if self._routed:
                metrics["train/router_density"] = fmean(step.density for step in updates)
        self._steps = []
        return metrics


def _drop_probs(drop_prob: Sequence[float]) -> dict[str, float]:
    """Name p(l, t) of each layer by its number, l + 1; nothing where none is dropped."""
    if not any(drop_prob):
        return {}
    return {f"layerskip/drop_prob_{l + 1:02d}": p for l, p in enumerate(drop_prob)}


def exit_metrics(split: str, losses: Mapping[int, float], L: int) -> dict[str, float]:
    """Name the loss of each exit by its E, the layers run, and the last one's "loss" too.

    Args:
        split: "train" or "validation".
        losses: {l: loss of the exit after layer l}; E = l + 1.
        L: Number of layers.
    """
    metrics = {f"{split}/loss_exit_{l + 1:02d}": loss for l, loss in losses.items()}
    return {f"{split}/loss": losses[L - 1], **metrics} if L - 1 in losses else metrics


def step_line(metrics: Mapping[str, float], done_steps: int, *, T: int, tokens_left: int) -> str:
    """Return the log line of a step: the losses of the first, middle and last exit, the speed."""
    parts = [f"step {done_steps}/{T}"]
    if "train/J" in metrics:
        exits = [name for name in metrics if name.startswith("train/loss_exit_")]
        shown = dict.fromkeys((exits[0], exits[(len(exits) - 1) // 2], exits[-1]))
        losses = ", ".join(f"{_exit_of(name)} {metrics[name]:.3f}" for name in shown)
        parts += [
            f"J {metrics['train/J']:.3f}",
            f"exit loss {losses}",
            f"grad norm {metrics['optim/grad_norm']:.2f}",
        ]
    if metrics["progress/skipped_updates"]:
        parts.append(f"{metrics['progress/skipped_updates']:.0f} updates skipped")
    tokens_per_second = metrics["perf/tokens_per_second"]
    speed = (
        f"MFU {metrics['perf/mfu']:.1%}"
        if "perf/mfu" in metrics
        else f"{metrics['perf/gflops_per_second']:.1f} GFLOP/s"
    )
    parts += [
        f"lr {metrics['optim/lr']:.2e}",
        f"{tokens_per_second:,.0f} tok/s",
        speed,
        f"data wait {metrics['perf/data_wait']:.1%}",
        f"{metrics['perf/peak_memory_gib']:.2f} GiB",
        f"ETA {clock(tokens_left / tokens_per_second)}",
    ]
    return " | ".join(parts)


def validation_line(losses: Sequence[float], done_steps: int, title: str) -> str:
    """Return the log line of a validation: the loss of every exit, E = 1, ..., L.

    The perplexity is that of all L layers.
    """
    perplexity = math.exp(min(losses[-1], 700.0))  # beyond, it is no float
    exits = " ".join(f"E={E} {loss:.3f}" for E, loss in enumerate(losses, 1))
    return f"{title} at step {done_steps}, by exit: {exits} | perplexity {perplexity:,.1f}"


def _exit_of(name: str) -> str:
    """Return the exit of a metric's name: E=8 of train/loss_exit_08."""
    return f"E={int(name.rpartition('_')[2])}"


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
