"""A training job: its parts, opened and closed in order, and the record of how it ended."""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.loader import Microbatch, TokenLoader
from models.llama import Llama
from train.checkpoints.checkpointer import CheckpointWriter
from train.checkpoints.content import RunIdentity, checkpoint_bytes
from train.checkpoints.resume import Resumed, resume
from train.config.config import TrainConfig
from train.decoding.speculation import Speculation
from train.loop.corpus import Corpus
from train.loop.layerskip import LayerSkipSchedule
from train.loop.run_state import RunState
from train.loop.validate import HeldOut
from train.monitoring.adam_monitor import AdamMonitor
from train.monitoring.hang_watchdog import Watchdog
from train.monitoring.interruption import Interruption
from train.monitoring.live_line import LiveLine
from train.monitoring.replica_check import ReplicaCheck
from train.monitoring.sections import Sections
from train.opened_data import open_data, open_speculation
from train.optimizer.optim import Optimizers, build_optimizer
from train.parallel.parallelize import build_model
from train.parallel.runtime import Runtime, connect_store
from train.record import record_hang, record_start
from train.resumed_rows import open_rows
from train.run_folder.events import EventLog, goodput, starts
from train.run_folder.preflight import check_checkpoint_folder, check_run_folder, check_space
from train.run_folder.run_lock import RunLock, lock_run
from train.run_folder.sinks import Sink
from train.run_folder.status import RunStatus
from train.run_folder.trackio_run import TrackioRun, open_trackio
from train.run_folder.weights_and_biases import WeightsAndBiases, Where, open_wandb
from train.run_folder.writing import attempt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All parts of one run, ready to take steps."""

    config: TrainConfig
    runtime: Runtime
    interruption: Interruption
    sections: Sections
    lock: RunLock
    events: EventLog
    status: RunStatus
    loader: TokenLoader
    held_out: HeldOut
    speculation: Speculation
    live_line: LiveLine
    layerskip: LayerSkipSchedule
    model: Llama
    optimizer: Optimizers
    adam_monitor: AdamMonitor
    replica_check: ReplicaCheck
    identity: RunIdentity
    checkpoints: CheckpointWriter
    resumed: Resumed
    trackers: tuple[Sink, ...]
    """The runs of W&B and Trackio that there are to be, on rank 0."""
    state: RunState
    """The state to go on from: the checkpoint's, and the rows skipped by rollbacks since."""

    def batches(self, start: int, state: RunState) -> Iterator[tuple[int, list[Microbatch]]]:
        """Yield (t, this rank's microbatches) from step `start` to the last."""
        return self.loader.batches(
            state.step_rows(start, self.config.data.batch),
            self.config.steps,
            pin_memory=self.runtime.device.type == "cuda",
        )

    def local_stop_requested(self) -> bool:
        """Whether this rank was requested to stop, or has lost the run to another job."""
        return bool(self.interruption.reason or self.lock.lost)

    def any_rank_stop_requested(self) -> bool:
        """Whether any rank was requested to stop; every rank calls this after the same step."""
        return any(self.runtime.gather(self.local_stop_requested()))

    def save(self, done: int, state: RunState, *, required: bool) -> None:
        """Write the checkpoint of `done` steps; see `CheckpointWriter.save`.

        Raises:
            ValueError: On rank 0, if another job has taken the run over.
        """
        self.runtime.on_every_rank(self.lock.check)
        self.checkpoints.save(done, state.as_dict(), required=required)
        self.status.note_saved(self.checkpoints.saved_step)
        self.status.write("running", done)

    def lifetime(self, state: RunState) -> dict[str, float]:
        """Return restarts, rollbacks and goodput over all starts of the run; {} but on rank 0."""
        if not self.runtime.is_main:
            return {}
        events = self.events.read()
        return {
            "progress/restarts": float(max(starts(events) - 1, 0)),
            "progress/rollbacks": float(sum(event["kind"] == "rollback" for event in events)),
            "progress/goodput": goodput(state.productive_seconds, events, time.time()),
        }

    def finish(self, done: int) -> None:
        """Record the end of the run: after its last step, or as a rank was requested to stop."""
        if done < self.config.steps:
            reason = next(filter(None, self.runtime.gather(self.interruption.reason)), "")
            self.events.append("preempted", done, reason=reason)
            self.status.write("preempted", done, reason)
            logger.info("stopped by %s after step %d; the same command resumes", reason, done)
            return
        model = self.config.run_dir / "model"
        if self.resumed.t < done or not self.runtime.gather(model.exists())[0]:
            self.checkpoints.write_model(model, done)
        if self.resumed.t < done:
            self.events.append("finish", done)
        else:
            logger.info("%s has done all its %d steps", self.config.run_dir, done)
        self.status.write("finished", done)


@contextmanager
def open_job(
    config: TrainConfig,
    runtime: Runtime,
    interruption: Interruption,
    given: Collection[str] = (),
) -> Iterator[Job]:
    """Lock the run folder, build everything and load the newest checkpoint.

    A failure of the `with` block is recorded in the run's events and status.

    Args:
        config: The run.
        runtime: This rank.
        interruption: Whether this process was requested to stop.
        given: The fields that the user has given, which may differ from the checkpoint's.

    Raises:
        ValueError: On rank 0, if the run cannot begin.
        SystemExit: On the other ranks then.
    """
    run_dir, sections = config.run_dir, Sections()
    status = RunStatus(run_dir, config.checkpoint_folder, config.runtime.status_file, runtime)
    with ExitStack() as stack:
        with status.record_end(sections):
            made = check_run_folder(
                run_dir, Path(config.output_dir), needed_bytes=0, runtime=runtime
            )
            lock = stack.enter_context(lock_run(run_dir, runtime))
        events = EventLog(run_dir / "events.jsonl", writes=runtime.is_main)
        status.hold(lock, made)
        stack.enter_context(status.record_end(sections))
        stack.enter_context(
            Watchdog(
                sections,
                connect_store(),
                run_dir / "hangs",
                rank=runtime.rank,
                world_size=runtime.world_size,
                timeout_seconds=config.runtime.timeout_seconds,
                setup_timeout_seconds=config.runtime.setup_timeout_seconds,
                record=partial(record_hang, run_dir / "events.jsonl"),
            )
        )
        job = _build(config, runtime, interruption, sections, lock, events, status, stack, given)
        if job.resumed.t < config.steps:
            status.write("running", job.resumed.t)
            record_start(config, runtime, events, job.resumed.t)
        interruption.start_training()
        yield job


def _build(
    config: TrainConfig,
    runtime: Runtime,
    interruption: Interruption,
    sections: Sections,
    lock: RunLock,
    events: EventLog,
    status: RunStatus,
    stack: ExitStack,
    given: Collection[str],
) -> Job:
    """Open the data, build the model, and load the newest checkpoint."""
    trackers = _open_trackers(config, runtime, stack)
    corpus, held_out = open_data(config, runtime, interruption)
    model, optimizer = _build_model(config, runtime)
    identity = _identify(config, corpus)
    folder, settings = config.checkpoint_folder, config.checkpoint
    resumed = resume(
        folder, model, optimizer, config=settings, identity=identity, runtime=runtime, given=given
    )
    state, loader = open_rows(config, runtime, corpus, resumed, events)
    writer = CheckpointWriter(
        folder, model, optimizer, config=settings, identity=identity, runtime=runtime
    )
    writer.saved_step = 0 if resumed.branched_from else resumed.t
    status.note_saved(writer.saved_step)
    return Job(
        config=config,
        runtime=runtime,
        interruption=interruption,
        sections=sections,
        lock=lock,
        events=events,
        status=status,
        loader=loader,
        held_out=held_out,
        speculation=open_speculation(config, corpus, held_out, runtime),
        layerskip=config.layerskip,
        model=model,
        optimizer=optimizer,
        live_line=stack.enter_context(LiveLine(config.steps, runtime)),
        adam_monitor=_monitor_adam(config, optimizer, runtime),
        replica_check=ReplicaCheck(config.replica_check, model, optimizer, runtime),
        identity=identity,
        checkpoints=stack.enter_context(writer),
        resumed=resumed,
        trackers=trackers,
        state=state,
    )


def _monitor_adam(config: TrainConfig, optimizer: Optimizers, runtime: Runtime) -> AdamMonitor:
    period = config.curriculum.R if config.curriculum.C == "rot" else 0
    return AdamMonitor(config.adam_monitor, optimizer, runtime, period=period)


def _identify(config: TrainConfig, corpus: Corpus) -> RunIdentity:
    return RunIdentity(
        model=config.model,
        config=config.as_dict(),
        tokenizer_path=corpus.datasets[0].tokenizer_path,
        tokenizer_fingerprint=corpus.datasets[0].tokenizer_fingerprint,
        data_fingerprint=corpus.fingerprint,
    )


def _open_trackers(config: TrainConfig, runtime: Runtime, stack: ExitStack) -> tuple[Sink, ...]:
    """Start the runs of W&B and Trackio, on rank 0; the end of the stack ends them."""
    settings, shown = config.metrics, config.as_dict()
    opened: list[WeightsAndBiases | TrackioRun | None] = []
    if runtime.is_main and settings.wandb:
        where = Where(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            group=settings.group,
            tags=settings.tags,
        )
        opened.append(open_wandb(config.run_dir, where, shown))
    if runtime.is_main and settings.trackio:
        opened.append(open_trackio(config.run_dir, settings.wandb_project, settings.group, shown))
    trackers = tuple(tracker for tracker in opened if tracker is not None)
    for tracker in trackers:
        stack.callback(attempt, tracker.target, tracker.close)
    return trackers


def _build_model(config: TrainConfig, runtime: Runtime) -> tuple[Llama, Optimizers]:
    """Build the model and its optimizer, and check that a checkpoint of them fits on the disk."""
    model = build_model(
        config.model, config.parallel, runtime, config.seed, trains=config.optim.trains
    )
    size = checkpoint_bytes(model, config.optim)
    if config.checkpoint.folder:
        check_checkpoint_folder(config.checkpoint_folder, size, runtime)
    else:
        check_space(config.run_dir, size, runtime)
    return model, build_optimizer(model, config.optim)
