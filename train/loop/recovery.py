"""Spike detection, and the rows to skip after a rollback.

A step whose loss or gradient is not finite updates nothing (train/loop/step.py). Several such
steps in a row, or a spike of the loss, roll the run back to an earlier checkpoint and past the
batches around it: the remedy of PaLM (arXiv 2204.02311, section 5.1), which found that neither the
batches nor the weights alone cause a spike, and of the paper on Adam's instability (arXiv
2304.09871). Everything here is a pure function of the steps' metrics, the same on every rank.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from train.loop.step_metrics import StepMetrics


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """When a loss spike or steps that are not finite cause a rollback, and how far."""

    on_spike: Literal["ignore", "warn", "rollback"] = "warn"
    """What a spike causes: nothing, a warning, or a rollback past the batches around it."""
    spike_score: float = 6.0
    """A step is suspicious when its last-layer loss (where exits alone learn, the deepest one's)
    and its gradient norm both lie this many robust standard deviations (1.48 median absolute
    deviations, at least 2% of the median) above the median of the steps before. 6 over 128 steps
    is OLMo 2's (arXiv 2501.00656)."""
    spike_steps: int = 3
    """Suspicious steps in a row that count as a spike."""
    window_steps: int = 128
    """Steps the median is taken over; none is suspicious before a quarter of them."""
    max_skipped_updates: int = 10
    """Steps in a row that update nothing, because they are not finite, until the run rolls back."""
    rollback_steps: int = 100
    """A rollback goes to the newest checkpoint at least this many steps before the anomaly."""
    skip_batches: int = 300
    """Batches skipped after a rollback, counted from that checkpoint: PaLM skipped 200 to 500. All
    those up to the anomaly are skipped in any case."""
    max_rollbacks: int = 3
    """Rollbacks over all starts of a run; an anomaly after that many ends it."""

    def problems(self) -> list[str]:
        """Return what is wrong with the fields, one line each; empty when nothing is."""
        least = {
            "spike_score": 1,
            "spike_steps": 1,
            "window_steps": 8,
            "max_skipped_updates": 1,
            "rollback_steps": 0,
            "skip_batches": 0,
            "max_rollbacks": 0,
        }
        return [
            f"recovery.{name}: {getattr(self, name)}, must be at least {bound}"
            for name, bound in least.items()
            if getattr(self, name) < bound
        ]


@dataclass(frozen=True)
class LossHistory:
    """Losses and gradient norms of the last steps; part of every checkpoint."""

    losses: tuple[float, ...] = ()
    """Loss of the monitored exit at the finite steps in the window, oldest first."""
    grad_norms: tuple[float, ...] = ()
    """Their gradient norms."""
    skipped_in_a_row: int = 0
    """Steps without an update, up to the last."""
    suspicious_in_a_row: int = 0
    """Suspicious steps, up to the last."""

    def after(
        self, step: StepMetrics, monitored_layer: int, config: RecoveryConfig
    ) -> "LossHistory":
        """Return the history after one more step, with its loss at the monitored layer's exit."""
        if not step.finite:
            return LossHistory(self.losses, self.grad_norms, self.skipped_in_a_row + 1, 0)
        if monitored_layer not in step.exit_losses:  # off in this step's curriculum
            return LossHistory(self.losses, self.grad_norms, 0, self.suspicious_in_a_row)
        loss, norm = step.exit_losses[monitored_layer], step.grad_norm
        suspicious = (
            len(self.losses) >= config.window_steps // 4
            and robust_score(loss, self.losses) > config.spike_score
            and robust_score(norm, self.grad_norms) > config.spike_score
        )
        return LossHistory(
            (*self.losses, loss)[-config.window_steps :],
            (*self.grad_norms, norm)[-config.window_steps :],
            0,
            self.suspicious_in_a_row + 1 if suspicious else 0,
        )

    def anomaly(self, before: "LossHistory", config: RecoveryConfig) -> "Anomaly | None":
        """Return the anomaly that the last step has completed, if any.

        Args:
            before: The history before that step.
            config: What counts as an anomaly.
        """
        if self.skipped_in_a_row >= config.max_skipped_updates:
            steps = self.skipped_in_a_row
            return Anomaly(f"{steps} steps in a row were not finite", steps, rollback=True)
        spike = self.suspicious_in_a_row == config.spike_steps > before.suspicious_in_a_row
        if spike and config.on_spike != "ignore":
            steps = self.suspicious_in_a_row
            return Anomaly(
                f"loss spike: {self.losses[-1]:.3f}, gradient norm {self.grad_norms[-1]:.3g}, where"
                f" the medians are {statistics.median(self.losses):.3f} and "
                f"{statistics.median(self.grad_norms):.3g}",
                steps,
                rollback=config.on_spike == "rollback",
            )
        return None


@dataclass(frozen=True)
class Anomaly:
    """A spike in loss and gradient norm, or steps that were not finite."""

    reason: str
    steps: int
    """Number of steps it has lasted."""
    rollback: bool
    """Whether the run is to roll back."""


def robust_score(value: float, history: Sequence[float]) -> float:
    """Return how many robust standard deviations `value` lies above the median of `history`.

    The deviation is 1.4826 median absolute deviations, as of a normal distribution, and at least
    2% of the median, so that small variations of a flat curve are no spikes.
    """
    middle = statistics.median(history)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in history)
    return (value - middle) / max(spread, 0.02 * abs(middle), math.ulp(0.0))


def skip_after_rollback(
    first: int, last: int, batch_size: int, config: RecoveryConfig
) -> tuple[int, int]:
    """Return the range of rows to skip after a rollback.

    They are all the rows read from the checkpoint up to the anomaly, and at least those of
    `skip_batches`.

    Args:
        first: The row that follows the checkpoint.
        last: The last row read.
        batch_size: Rows per step.
        config: How many batches to skip.
    """
    return first, max(first + config.skip_batches * batch_size, last + 1)


def rollback_step(
    checkpoints: Sequence[int], anomaly_start: int, config: RecoveryConfig
) -> int | None:
    """Choose the checkpoint to roll back to: the newest `rollback_steps` before the anomaly.

    Where none is that old, the oldest from before the anomaly; None if there is none at all.

    Args:
        checkpoints: Steps done at each, ascending.
        anomaly_start: First step of the anomaly.
        config: How far to roll back.
    """
    before = [t for t in checkpoints if t <= anomaly_start]
    old_enough = [t for t in before if t <= anomaly_start - config.rollback_steps]
    return old_enough[-1] if old_enough else before[0] if before else None
