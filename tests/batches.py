"""Batches of a run that began at row 0 and has changed nothing since."""

from data.batch_ramp import BatchRamp
from data.loader import Microbatch, TokenLoader
from data.step_rows import StepRows


def batch_at(loader: TokenLoader, t: int) -> list[Microbatch]:
    """Return this rank's microbatches of step t."""
    return loader.batch(StepRows(0, 0, BatchRamp(loader.global_batch_size)).at(t))
