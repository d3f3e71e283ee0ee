"""The state of a run besides its tensors: part of every checkpoint, the same on every rank.

The rows read are counted here and not derived from the step, so that the size of a batch, its
sources and their windows may change in the middle of a run. All else is a function of the step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data.batch_ramp import BatchRamp
from data.reading import Reading, count, reading_from_dict
from data.step_rows import Ranges, StepRows
from train.loop.recovery import LossHistory


@dataclass(frozen=True)
class RunState:
    """The state in a checkpoint besides tensors."""

    rows: int = 0
    """Rows read by the steps that led here."""
    tokens: int = 0
    """Tokens in them."""
    skipped_rows: Ranges = ()
    """Rows that are never read."""
    reading: Reading | None = None
    """The mixture they are read from; None in checkpoints of version 0.1."""
    origin: tuple[str, int] | None = None
    """The run that this one was branched from, and the step; None: it began at step 0."""
    loss_history: LossHistory = field(default_factory=LossHistory)
    productive_seconds: float = 0.0
    """Time spent on the steps that led here."""

    @property
    def next_row(self) -> int:
        """The row that is read next."""
        return StepRows(0, self.rows, BatchRamp(1), self.skipped_rows).first(0)

    @property
    def last_row(self) -> int:
        """The row that was read last."""
        return StepRows(0, self.rows - 1, BatchRamp(1), self.skipped_rows).first(0)

    def step_rows(self, step: int, batch: BatchRamp) -> StepRows:
        """Return the rows of the steps that follow the first `step`."""
        return StepRows(step, self.rows, batch, self.skipped_rows)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON would hold it."""
        return asdict(self)

    def after_step(self, loss_history: LossHistory, *, rows: int, seq_len: int) -> "RunState":
        """Return the state after one more step of so many rows."""
        return replace(
            self,
            rows=self.rows + rows,
            tokens=self.tokens + rows * seq_len,
            loss_history=loss_history,
        )

    def back_at(self, earlier: "RunState") -> "RunState":
        """Return an earlier state, from which the run goes on with the mixture it now has.

        Rows of an earlier mixture lie before the first of this one.
        """
        return replace(
            earlier, skipped_rows=self.skipped_rows, reading=self.reading, origin=self.origin
        )

    def with_seconds(self, seconds: float) -> "RunState":
        """Return the state after more productive seconds."""
        return replace(self, productive_seconds=self.productive_seconds + seconds)

    def skipping(self, ranges: Iterable[tuple[int, int]]) -> "RunState":
        """Return the state with more rows that are never read."""
        return replace(self, skipped_rows=tuple(sorted({*self.skipped_rows, *ranges})))


def run_state_from_dict(
    fields: Mapping[str, Any], *, step: int = 0, data: Mapping[str, Any] | None = None
) -> RunState:
    """Rebuild the state of a checkpoint; of an empty dictionary, that of a new run.

    Args:
        fields: As of `RunState.as_dict`, or of version 0.1.
        step: Steps done at the checkpoint.
        data: The data section of the configuration it was trained with.

    Raises:
        ValueError: It is no state.
    """
    if not fields:
        return RunState()
    try:
        if "rows" not in fields:
            fields = _counted(fields, step, data or {})
        # "health": its name in checkpoints of version 0.1.
        history = fields["loss_history"] if "loss_history" in fields else fields["health"]
        reading, origin = fields["reading"], fields["origin"]
        return RunState(
            count(fields["rows"]),
            count(fields["tokens"]),
            tuple((count(first), count(stop)) for first, stop in fields["skipped_rows"]),
            None if reading is None else reading_from_dict(reading),
            None if origin is None else (str(origin[0]), count(origin[1])),
            LossHistory(
                tuple(map(float, history["losses"])),
                tuple(map(float, history["grad_norms"])),
                int(history["skipped_in_a_row"]),
                int(history["suspicious_in_a_row"]),
            ),
            float(fields["productive_seconds"]),
        )
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: the state of step {step} cannot be read ({error!r}), "
            "use another checkpoint"
        ) from error


def _counted(fields: Mapping[str, Any], step: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a checkpoint of version 0.1, which counts steps and batches."""
    size = data["global_batch_size"]
    return {
        **fields,
        "rows": step * size,
        "tokens": step * size * data["seq_len"],
        "skipped_rows": [(first * size, stop * size) for first, stop in fields["skipped_batches"]],
        "reading": None,
        "origin": None,
    }
