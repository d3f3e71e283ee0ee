"""Roll back to a checkpoint from before an anomaly, and skip the batches around it."""

import logging

from models.checkpoint_format import checkpoint_steps
from train.checkpoints.resume import load_earlier
from train.job import Job
from train.loop.recovery import (
    Anomaly,
    RunState,
    rollback_step,
    run_state_from_dict,
    skip_after_rollback,
)

logger = logging.getLogger(__name__)


def roll_back(
    job: Job, anomaly_start: int, anomaly: Anomaly, t: int, state: RunState
) -> tuple[int, RunState]:
    """Load an earlier checkpoint; the batches since are never read again.

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
    folder = job.checkpoint_folder

    last_step = _choose_checkpoint(job, anomaly_start, anomaly, t)
    resumed = load_earlier(
        folder,
        job.model,
        job.optimizer,
        last_step=last_step,
        identity=job.identity,
        runtime=runtime,
    )
    skipped = skip_after_rollback(
        to=resumed.t, anomaly_t=t - 1, skipped=state.skipped_batches, config=config
    )
    # Recorded only now: a job that dies before this meets the same anomaly and rolls back again.
    runtime.on_every_rank(lambda: _record(job, t, resumed.t, skipped, anomaly.reason))
    if runtime.is_main:
        logger.warning(
            "%s: rolled back from step %d to %d, skipping the batches %d to %d",
            anomaly.reason,
            t,
            resumed.t,
            skipped[0],
            skipped[1] - 1,
        )
    before = run_state_from_dict(resumed.state)
    return resumed.t, before.skipping([*state.skipped_batches, skipped])


def _record(job: Job, t: int, to: int, skipped: tuple[int, int], reason: str) -> None:
    try:
        job.events.append_required("rollback", t, to=to, skipped=skipped, reason=reason)
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
        step = rollback_step(list(checkpoint_steps(job.checkpoint_folder)), anomaly_start, config)
        if step is None:
            raise ValueError(
                f"recovery: {anomaly.reason} at step {t}, and no checkpoint from before step "
                f"{anomaly_start} to roll back to, lower optim.lr or checkpoint.interval_steps"
            )
        return step

    return runtime.gather(runtime.on_every_rank(choose))[0]
