"""Roll back to a checkpoint from before an anomaly, and skip the rows around it."""

import logging

from models.checkpoint_format import checkpoint_steps
from train.checkpoints.resume import load_earlier
from train.job import Job
from train.loop.recovery import Anomaly, rollback_step, skip_after_rollback
from train.loop.run_state import RunState
from train.resumed_rows import checkpoint_state

logger = logging.getLogger(__name__)


def roll_back(
    job: Job, anomaly_start: int, anomaly: Anomaly, t: int, state: RunState
) -> tuple[int, RunState]:
    """Load an earlier checkpoint; the rows since are never read again.

    Args:
        job: The run; its weights and moments are replaced.
        anomaly_start: First step of the anomaly.
        anomaly: The anomaly.
        t: Steps done.
        state: The state after these.

    Returns:
        Steps done at the checkpoint, and the state to continue from.

    Raises:
        ValueError: On rank 0, if there is no earlier checkpoint, or recovery.max_rollbacks are
            used up.
        SystemExit: On the other ranks then.
    """
    config, runtime = job.config.recovery, job.runtime
    job.sections.enter("checkpoint", t)
    job.checkpoints.wait()
    resumed = load_earlier(
        job.config.checkpoint_folder,
        job.model,
        job.optimizer,
        last_step=_choose_checkpoint(job, anomaly_start, anomaly, t),
        identity=job.identity,
        runtime=runtime,
    )
    before = state.back_at(checkpoint_state(resumed))
    skipped = skip_after_rollback(
        before.next_row, state.last_row, job.config.data.batch.at(t), config
    )
    # Recorded only now: a job that dies before this meets the same anomaly and rolls back again.
    reading = state.as_dict()["reading"]
    runtime.on_every_rank(lambda: _record(job, t, resumed.t, skipped, reading, anomaly.reason))
    if runtime.is_main:
        line = "%s: rolled back from step %d to %d, skipping the rows %d to %d"
        logger.warning(line, anomaly.reason, t, resumed.t, skipped[0], skipped[1] - 1)
    return resumed.t, before.skipping([skipped])


def _record(
    job: Job, t: int, to: int, skipped: tuple[int, int], reading: object, reason: str
) -> None:
    try:
        job.events.append_required(
            "rollback", t, to=to, skipped_rows=skipped, reading=reading, reason=reason
        )
    except OSError as error:
        raise ValueError(
            f"recovery: the rollback from step {t} could not be written down, {error}, make room "
            "there and start the run again"
        ) from error


def _choose_checkpoint(job: Job, anomaly_start: int, anomaly: Anomaly, t: int) -> int:
    """Return the step of the checkpoint to roll back to, as rank 0 chooses it."""
    config, runtime = job.config.recovery, job.runtime

    def choose() -> int:
        if not runtime.is_main:
            return -1
        done = sum(event["kind"] == "rollback" for event in job.events.read())
        if done >= config.max_rollbacks:
            raise ValueError(
                f"recovery.max_rollbacks: {config.max_rollbacks} are used up, and again "
                f"{anomaly.reason} at step {t}; lower optim.lr and start from an earlier checkpoint"
            )
        step = rollback_step(
            list(checkpoint_steps(job.config.checkpoint_folder)), anomaly_start, config
        )
        if step is None:
            raise ValueError(
                f"recovery: {anomaly.reason} at step {t}, and no checkpoint from before step "
                f"{anomaly_start} to roll back to, lower optim.lr or checkpoint.interval_steps"
            )
        return step

    return runtime.gather(runtime.on_every_rank(choose))[0]
