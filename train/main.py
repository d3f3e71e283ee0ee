"""Pretrain a Llama with the LayerSkip recipe: torchrun --nproc_per_node=8 train/main.py [PRESET].

Reads like the algorithm: the plan of step t, one step of minimising J, and what is due after it.
"""

from train.monitoring.interruption import Interruption, StopRequestError

if __name__ == "__main__":
    _interruption = Interruption.before_imports()

import logging
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path

from data.urls import is_url
from train.config.command_line import parse
from train.config.config import TrainConfig
from train.config.settled import settle
from train.follow import TrainingMonitor
from train.job import Job, open_job
from train.loop.corpus import open_corpus
from train.loop.report import exit_metrics, validation_line
from train.loop.run_state import RunState
from train.loop.step import train_step
from train.loop.step_metrics import DeferredReader
from train.loop.validate import validate
from train.parallel.runtime import (
    USER_ERROR,
    Runtime,
    end_process,
    is_first_of_node,
    is_main_process,
    launched_job,
    launched_ranks,
    start_logging,
    start_runtime,
    wait_to_be_ended,
)
from train.parallel.titan import GarbageCollection
from train.planning.dry_run import plan_run
from train.rollback import roll_back
from train.run_folder.failures import AGREED, is_communication, is_final
from train.run_folder.metrics import open_metrics
from train.run_folder.preflight import refuse_early
from train.run_folder.profiler import Profiler
from train.run_folder.run_lock import RunHeldError, refuse_held
from train.run_folder.samples import write_samples
from train.run_folder.sinks import Metrics
from train.summary import log_summary

RUN_HELD = 3
"""Exit status of --check where another job trains the run."""
PEER_REPORTS_WITHIN_SECONDS = 3.0
"""How long a rank that has lost another one waits for that one's report."""
logger = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    runtime: Runtime,
    interruption: Interruption,
    given: Collection[str] = (),
    preset: TrainConfig | None = None,
) -> None:
    """Train from the newest checkpoint of the run, or from step 0, to the last step.

    Args:
        config: The run.
        runtime: This rank.
        interruption: Whether this process was requested to stop.
        given: The fields that the user has given, which may differ from the checkpoint's.
        preset: What the run was made of, to show what differs.
    """
    with open_job(config, runtime, interruption, given) as job:
        t, state = job.resumed.t, job.state
        while t < config.steps and not job.any_rank_stop_requested():
            metrics = open_metrics(
                config.metrics,
                config.run_dir,
                config.as_dict(),
                done_steps=t,
                runtime=runtime,
                preset=None if preset is None else preset.as_dict(),
                trackers=job.trackers,
            )
            monitor = run_steps(job, t, state, metrics)
            monitor.close()
            t, state = monitor.done_steps, monitor.state
            if monitor.anomaly is not None:
                t, state = roll_back(job, *monitor.anomaly, t, state)
            elif t == config.steps:
                metrics.log_summary({}, "finished")
        job.finish(t)
        if job.resumed.t < t == config.steps:
            log_summary(job, state)


def run_steps(job: Job, start: int, state: RunState, metrics: Metrics) -> TrainingMonitor:
    """Take steps from `start` on, to the last, a requested stop or an anomaly to roll back from."""
    config, runtime, sections = job.config, job.runtime, job.sections
    monitor = TrainingMonitor(job, start, state, metrics)
    reader = DeferredReader()
    collector = GarbageCollection(gc_freq=100)
    profiler = Profiler(config.profile, config.steps, config.run_dir, runtime, sections)
    profiler.enter(start)
    sections.enter("data", start)
    for t, microbatches in job.batches(start, state):
        sections.enter("step", t)
        plan = job.layerskip.at(t)  # p(l, t) = S(t) D(l) p_max and e_tilde(t, l) from C(t, l) e(l)
        result = train_step(
            job.model,
            job.optimizer,
            microbatches,
            plan,
            t,
            config=config.step_config,
            runtime=runtime,
            adam_monitor=job.adam_monitor,
            local_stop_requested=job.local_stop_requested(),
        )  # minimises J(X, Y, t)
        monitor.observe(reader.push(t, result))
        done = t + 1
        logs = due(config.metrics.interval_steps, done, config.steps)
        saves = due(config.checkpoint.interval_steps, done, config.steps)
        if logs or saves or monitor.stop:
            monitor.observe(reader.drain())
        if monitor.anomaly is not None:
            break
        monitor.run_checks(done)
        if logs:
            sections.enter("log", t)
            monitor.log(done)
        if due(config.validate.interval_steps, done, config.steps) and not monitor.stop:
            sections.enter("validate", t)
            report_validation(job, done, metrics)
        if job.speculation.due(done, config.steps) and not monitor.stop:
            sections.enter("decode", t)
            report_speculation(job, done, metrics)
        if saves or monitor.stop:
            sections.enter("checkpoint", t)
            job.save(done, monitor.state, required=monitor.stop or done == config.steps)
        if monitor.stop:
            break
        collector.run(done)
        profiler.enter(done)
        sections.enter("data", done)
    profiler.close()
    return monitor


def report_validation(job: Job, done_steps: int, metrics: Metrics) -> None:
    """Measure and log the held-out loss of every exit, and that of the averaged weights."""
    measure_validation(job, done_steps, metrics, "validation", "held-out loss")
    if job.optimizer.average is not None:
        with job.optimizer.average.in_place():
            measure_validation(
                job, done_steps, metrics, "validation_ema", "held-out loss of the EMA"
            )


def measure_validation(job: Job, done_steps: int, metrics: Metrics, split: str, title: str) -> None:
    """Measure and log the held-out loss of every exit of the weights as they are."""
    config = job.config
    losses = validate(
        job.model,
        job.held_out,
        config.validate,
        job.runtime,
        rows=config.data.rows_at_once(job.runtime.world_size),
        chunk_rows=config.early_exit.chunk_rows,
        token_depth=config.token_depth,
    )
    if not losses:
        logger.info("%s at step %d: none, for no token has a label", title, done_steps)
        return
    metrics.log(exit_metrics(split, dict(enumerate(losses)), len(losses)), done_steps)
    logger.info("%s", validation_line(losses, done_steps, title))


def report_speculation(job: Job, done_steps: int, metrics: Metrics) -> None:
    """Measure what drafts of the exits would gain; log it, and samples of text."""
    if (found := job.speculation.measure(job.model)) is None:
        return
    metrics.log(found.metrics, done_steps)
    metrics.log_texts({f"samples/{name}": text for name, text in found.samples.items()}, done_steps)
    write_samples(job.config.run_dir / "samples", done_steps, found.samples)
    logger.info("drafts at step %d: %s", done_steps, found.line)


def due(interval_steps: int, done_steps: int, steps: int) -> bool:
    """Whether something that happens every `interval_steps`, and at the end, happens now."""
    return done_steps == steps or bool(interval_steps and done_steps % interval_steps == 0)


def main(arguments: Sequence[str], interruption: Interruption | None = None) -> int:
    """Run the command line, and return the exit status.

    Args:
        arguments: The command line without the program's name.
        interruption: Requests to stop that were caught before; None: there is nothing yet.
    """
    start_logging()
    try:
        command = parse(arguments, show=is_main_process())
        config = settle(command)
        if command.dry_run:
            if is_main_process():
                print(plan_run(config, command.dry_run, by_tokens="tokens" in command.given))
            return 0
        config.check(launched_ranks())
        if command.check:
            check(config)
            return 0
        for line in config.optim.warnings(config.steps):
            logger.info("%s", line)
    except RunHeldError as error:  # met by a check
        fail(error, prints=is_first_of_node())
        return RUN_HELD
    except ValueError as error:
        return fail(error, prints=is_first_of_node())
    try:
        with (
            interruption or Interruption() as interruption,
            start_runtime(config.runtime, config.seed) as runtime,
        ):
            try:
                train(config, runtime, interruption, command.given, command.preset)
            except StopRequestError as stop:
                logger.info("stopped by %s before the first step; the same command resumes", stop)
    except Exception as error:
        return end(error)
    return 0


def end(error: Exception) -> int:
    """Report a failure, and return the exit status: 2 where a restart would meet it again."""
    if is_communication(error):
        # A rank that has failed reports why, and torchrun ends this one: that line is the last.
        wait_to_be_ended(PEER_REPORTS_WITHIN_SECONDS)
        line = f"error: connection: another rank is gone, the same command resumes ({error})"
        print(line, file=sys.stderr)
    elif isinstance(error, (*AGREED, ValueError, OSError)):
        fail(error, prints=is_main_process() or not isinstance(error, AGREED))
    else:
        traceback.print_exception(error)
    return USER_ERROR if is_final(error) else 1


def check(config: TrainConfig) -> None:
    """Refuse what a run of this configuration would be refused for, and change nothing.

    Raises:
        RunHeldError: If another job trains it.
        ValueError: If it cannot begin.
    """
    refuse_early(config.run_dir, Path(config.output_dir))
    refuse_held(config.run_dir, launched_job())
    if not is_url(config.data.path) and Path(config.data.path).exists():
        open_corpus(config.data, config.model.vocab_size)


def fail(error: Exception, *, prints: bool) -> int:
    """Print a user's error, one line per problem, and return the exit status.

    Raises:
        SystemExit: Where another rank prints it.
    """
    if not prints:
        raise SystemExit(USER_ERROR)
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    end_process(lambda: main(sys.argv[1:], _interruption), lambda: bool(_interruption.reason))
