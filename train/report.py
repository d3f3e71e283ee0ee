"""What is said of training: the losses since the last log line, as metrics and as one line."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from train.config import TrainConfig
from train.layerskip import StepPlan
from train.optim import lr
from train.runtime import Runtime
from train.step import StepResult
from train.throughput import Throughput


class StepReport:
    """Gathers steps on the device; the host looks at them only when a line is due."""

    def __init__(self, config: TrainConfig, runtime: Runtime) -> None:
        """Start with no step seen."""
        self._config, self._runtime = config, runtime
        self.throughput = Throughput(config.model, config.data.seq_len, runtime)
        self._clear()

    def _clear(self) -> None:
        self._J = torch.zeros((), device=self._runtime.device)
        self._exits = torch.zeros(2, self._config.model.n_layers, device=self._runtime.device)
        self._grad_norm: Tensor | None = None
        self._steps = 0

    def add(self, result: StepResult, plan: StepPlan) -> None:
        """Take in one step, without waiting for the device."""
        self._J += result.J
        self._exits += torch.stack((result.exit_loss_sums, result.exit_tokens))
        self._grad_norm = result.grad_norm
        self._plan = plan
        self._steps += 1
        self.throughput.add(
            self._config.data.tokens_per_step,
            mean_layers=plan.mean_layers,
            num_exits=len(plan.exit_layers),
        )

    def read(self, done_steps: int) -> dict[str, float]:
        """Return the means since the last reading, over all ranks; every rank calls this.

        Raises:
            FloatingPointError: If a loss or the gradient norm is not finite.
        """
        assert self._grad_norm is not None
        totals = self._runtime.sum_over_ranks(torch.cat((self._J[None], self._exits.flatten())))
        J, *flat = totals.tolist()
        L = self._config.model.n_layers
        means = {
            l: total / count
            for l, (total, count) in enumerate(zip(flat[:L], flat[L:], strict=True))
            if count
        }
        for l, loss in means.items():
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss of the exit after layer {l} is {loss} within the {self._steps} steps up "
                    f"to {done_steps}, lower optim.lr and resume"
                )
        metrics = {
            "train/J": J / self._steps,
            **exit_metrics("train", means, L),
            "optim/grad_norm": self._grad_norm.item(),
            "optim/lr": lr(self._config.optim, done_steps - 1, self._config.steps),
            "layerskip/p_max_t": max(self._plan.drop_prob),
            "layerskip/mean_layers": self._plan.mean_layers,
            "layerskip/num_exits": float(len(self._plan.exit_layers)),
            "progress/tokens": float(done_steps * self._config.data.tokens_per_step),
            **self.throughput.read(),
        }
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {done_steps}, lower optim.lr and resume"
                )
        self._clear()
        return metrics


def exit_metrics(split: str, losses: Mapping[int, float], L: int) -> dict[str, float]:
    """Name the loss of the exit after each layer l, and the last layer's as the loss."""
    metrics = {f"{split}/loss_exit_{l:02d}": loss for l, loss in losses.items()}
    return {f"{split}/loss": losses[L - 1], **metrics} if L - 1 in losses else metrics


def step_line(metrics: Mapping[str, float], done_steps: int, config: TrainConfig) -> str:
    """Write one log step in one line."""
    exits = [name for name in metrics if name.startswith("train/loss_exit_")]
    shown = dict.fromkeys((exits[0], exits[(len(exits) - 1) // 2], exits[-1]))
    losses = ", ".join(f"{name[-2:]} {metrics[name]:.3f}" for name in shown)
    tokens_per_second = metrics["perf/tokens_per_second"]
    left = (config.steps - done_steps) * config.data.tokens_per_step / tokens_per_second
    speed = (
        f"MFU {metrics['perf/mfu']:.1%}"
        if "perf/mfu" in metrics
        else f"{metrics['perf/gflops_per_second']:.1f} GFLOP/s"
    )
    return (
        f"step {done_steps}/{config.steps} | J {metrics['train/J']:.3f} | exit loss {losses} | "
        f"grad norm {metrics['optim/grad_norm']:.2f} | lr {metrics['optim/lr']:.2e} | "
        f"{tokens_per_second:,.0f} tok/s | {speed} | "
        f"{metrics['perf/peak_memory_gib']:.2f} GiB | ETA {_clock(left)}"
    )


def validation_line(losses: Sequence[float], done_steps: int) -> str:
    """Write the held-out loss of every exit in one line."""
    exits = " ".join(f"{l:02d} {loss:.3f}" for l, loss in enumerate(losses))
    return f"held-out loss at step {done_steps}, by exit: {exits}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
