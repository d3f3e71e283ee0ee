"""When a run is ill, and what batches it must never see again.

A step whose loss or gradient is not finite updates nothing (train/loop/step.py). A stretch of such
steps, or a spike of the loss, sends the run back to an earlier checkpoint and past the batches
around it: the cure of PaLM (arXiv 2204.02311, section 5.1), which found that neither the batches
nor the weights alone make a spike. The seed on Adam's instability (arXiv 2304.09871) names it too.
Everything here is a pure function of the steps' outcomes, which are the same on every rank.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from data.loader import batch_number
from train.loop.outcome import Outcome

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of batch numbers."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What is done about bad steps and loss spikes."""

    on_spike: Literal["ignore", "warn", "rollback"] = "warn"
    """What a spike does: nothing, a warning, or a rollback past the batches around it."""
    spike_score: float = 6.0
    """A step is suspicious when its last-layer loss (where exits alone learn, the deepest one's)
    and its gradient norm both lie this many robust standard deviations (1.48 median absolute
    deviations, at least 2% of the median) above the median of the steps before. 6 over 128 steps
    is OLMo 2's (arXiv 2501.00656)."""
    spike_steps: int = 3
    """Suspicious steps in a row that make a spike."""
    window_steps: int = 128
    """Steps the median is taken over; a quarter of them must have been seen first."""
    max_skipped_updates: int = 10
    """Steps in a row that update nothing, because they are not finite, until the run rolls back."""
    rollback_steps: int = 100
    """A rollback goes to the newest checkpoint at least this many steps before the trouble."""
    skip_batches: int = 300
    """Batches left out after a rollback, counted from that checkpoint: PaLM left out 200 to 500;
    in any case all that were seen up to the trouble."""
    max_rollbacks: int = 3
    """Rollbacks in the life of a run; trouble after that many ends it."""

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
class Health:
    """What the last steps looked like; part of every checkpoint."""

    losses: tuple[float, ...] = ()
    """Watched loss of the finite steps in the window, oldest first."""
    grad_norms: tuple[float, ...] = ()
    """Their gradient norms."""
    skipped_in_a_row: int = 0
    """Steps without an update, up to now."""
    suspicious_in_a_row: int = 0
    """Suspicious steps, up to now."""

    def after(self, outcome: Outcome, watched: int, config: RecoveryConfig) -> "Health":
        """Return the health after one more step, by the loss of the exit after layer `watched`."""
        if not outcome.finite:
            return Health(self.losses, self.grad_norms, self.skipped_in_a_row + 1, 0)
        if watched not in outcome.exit_losses:  # this step's curriculum left it out
            return Health(self.losses, self.grad_norms, 0, self.suspicious_in_a_row)
        loss, norm = outcome.exit_losses[watched], outcome.grad_norm
        suspicious = (
            len(self.losses) >= config.window_steps // 4
            and score(loss, self.losses) > config.spike_score
            and score(norm, self.grad_norms) > config.spike_score
        )
        return Health(
            (*self.losses, loss)[-config.window_steps :],
            (*self.grad_norms, norm)[-config.window_steps :],
            0,
            self.suspicious_in_a_row + 1 if suspicious else 0,
        )

    def trouble(self, before: "Health", config: RecoveryConfig) -> "Trouble | None":
        """Return what has become wrong since the health of the step before, if anything."""
        if self.skipped_in_a_row >= config.max_skipped_updates:
            steps = self.skipped_in_a_row
            return Trouble(f"{steps} steps in a row were not finite", steps, rollback=True)
        spike = self.suspicious_in_a_row == config.spike_steps > before.suspicious_in_a_row
        if spike and config.on_spike != "ignore":
            steps = self.suspicious_in_a_row
            return Trouble(
                f"loss spike: {self.losses[-1]:.3f}, gradient norm {self.grad_norms[-1]:.3g}, where"
                f" the medians are {statistics.median(self.losses):.3f} and "
                f"{statistics.median(self.grad_norms):.3g}",
                steps,
                rollback=config.on_spike == "rollback",
            )
        return None


@dataclass(frozen=True)
class Trouble:
    """Why a run is ill."""

    reason: str
    steps: int
    """How many steps it has lasted."""
    rollback: bool
    """Whether the run is to go back."""


@dataclass(frozen=True)
class RunState:
    """What a checkpoint must hold besides tensors; all else follows from the step."""

    health: Health = field(default_factory=Health)
    skipped_batches: Ranges = ()
    """Batch numbers that are never dealt."""
    productive_seconds: float = 0.0
    """Time spent on the steps that led here."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON would hold it."""
        return asdict(self)

    def with_health(self, health: Health) -> "RunState":
        """Return the state with another health."""
        return replace(self, health=health)

    def with_seconds(self, seconds: float) -> "RunState":
        """Return the state after so many more productive seconds."""
        return replace(self, productive_seconds=self.productive_seconds + seconds)

    def skipping(self, ranges: Iterable[tuple[int, int]]) -> "RunState":
        """Return the state with more batches that are never dealt."""
        together = sorted({*self.skipped_batches, *ranges})
        return replace(self, skipped_batches=tuple(together))


def run_state_from_dict(fields: dict[str, Any]) -> RunState:
    """Rebuild the state of a checkpoint; an empty dictionary gives a new run's."""
    if not fields:
        return RunState()
    health = fields["health"]
    return RunState(
        Health(
            tuple(health["losses"]),
            tuple(health["grad_norms"]),
            health["skipped_in_a_row"],
            health["suspicious_in_a_row"],
        ),
        tuple((first, stop) for first, stop in fields["skipped_batches"]),
        fields["productive_seconds"],
    )


def score(value: float, history: Sequence[float]) -> float:
    """Return how many robust standard deviations `value` lies above the median of `history`.

    The deviation is 1.4826 median absolute deviations, that of a normal distribution, and at least
    2% of the median, so that a flat curve does not make every ripple a spike.
    """
    middle = statistics.median(history)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in history)
    return (value - middle) / max(spread, 0.02 * abs(middle), math.ulp(0.0))


def skip_after_rollback(
    *, to: int, trouble_t: int, skipped: Ranges, config: RecoveryConfig
) -> tuple[int, int]:
    """Return the range of batches to leave out when going back from step trouble_t to step `to`.

    They are all the batches dealt from `to` up to the trouble, and at least `skip_batches`.
    """
    first = batch_number(to, skipped)
    return first, max(first + config.skip_batches, batch_number(trouble_t, skipped) + 1)


def rollback_step(
    checkpoints: Sequence[int], trouble_began: int, config: RecoveryConfig
) -> int | None:
    """Choose the checkpoint to go back to: the newest that is `rollback_steps` before the trouble.

    Where none is that old it is the oldest from before the trouble; None if there is none at all.

    Args:
        checkpoints: Steps done at each, ascending.
        trouble_began: First step of the trouble.
        config: How far to go back.
    """
    before = [t for t in checkpoints if t <= trouble_began]
    old_enough = [t for t in before if t <= trouble_began - config.rollback_steps]
    return old_enough[-1] if old_enough else before[0] if before else None
