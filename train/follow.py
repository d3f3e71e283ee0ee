"""Follow the steps of a run on the host: log them, detect anomalies, decide whether to go on."""

import logging
from collections.abc import Sequence

from train.job import Job
from train.loop.recovery import Anomaly
from train.loop.report import StepReport, step_line
from train.loop.run_state import RunState
from train.loop.step_metrics import StepMetrics
from train.loop.throughput import Throughput
from train.monitoring.adam_monitor import alarms
from train.monitoring.stragglers import StragglerWatch
from train.optimizer.optim import lr
from train.run_folder.histogram import Histogram
from train.run_folder.sinks import Metrics

logger = logging.getLogger(__name__)


class TrainingMonitor:
    """Observes the metrics of each step, which are the same on all ranks, as are its decisions."""

    def __init__(self, job: Job, start: int, state: RunState, metrics: Metrics) -> None:
        """Continue from the state after `start` steps."""
        self.done_steps, self.state = start, state
        self.stop = False
        """Whether any rank was requested to stop."""
        self.anomaly: tuple[int, Anomaly] | None = None
        """First step of the anomaly to roll back from, and that anomaly; None: go on."""
        self._job, self._metrics = job, metrics
        self._rows = state.step_rows(start, job.config.data.batch)
        job.sections.read()  # leaves out the time before these steps
        config = job.config
        self._report = StepReport(
            config.model.n_layers,
            Throughput(
                config.model,
                config.data.seq_len,
                job.runtime,
                capacity=config.router.capacity,
                trains=config.optim.trains,
            ),
            routed=config.model.router != "none",
        )
        self._stragglers = StragglerWatch(
            config.stragglers,
            job.runtime,
            lambda: job.sections.current[0],
            done_steps=start,
        )

    def observe(self, steps: Sequence[StepMetrics]) -> None:
        """Add steps to the report and to the run's state; every rank calls this alike."""
        config, monitored_layer = self._job.config.recovery, self._job.layerskip.monitored_layer
        data = self._job.config.data
        for step in steps:
            rows = data.batch.at(step.t)
            self._report.add(step, self._job.layerskip.at(step.t), tokens=rows * data.seq_len)
            self.done_steps = step.t + 1
            self.stop = self.stop or step.stop
            if not step.updated:
                self._record_skipped(step)
            before = self.state.loss_history
            history = before.after(step, monitored_layer, config)
            self.state = self.state.after_step(history, rows=rows, seq_len=data.seq_len)
            self._job.live_line.show(
                self.done_steps,
                loss=step.exit_losses.get(self._job.config.model.n_layers - 1),
                tokens=rows * data.seq_len,
            )
            if anomaly := history.anomaly(before, config):
                self._record("anomaly", step.t, anomaly.reason)
                if anomaly.rollback and self.anomaly is None:
                    self.anomaly = (step.t - anomaly.steps + 1, anomaly)

    def run_checks(self, done: int) -> None:
        """Check replicas, stragglers and Adam's updates where that is due; every rank calls this.

        Raises:
            ReplicasDifferError: On every rank, if ranks hold different bits for one tensor.
        """
        job, config = self._job, self._job.config
        if job.replica_check.due(done):
            job.replica_check.check(done)
        if self._stragglers.due(done):
            for line in self._stragglers.read(done):
                self._record("straggler", done - 1, line)
        if job.adam_monitor.due(done):
            statistics = job.adam_monitor.read()
            self._metrics.log(statistics.metrics(), done)
            self._metrics.log_histograms(
                {
                    f"adam/update_ratio/{name}": Histogram(counts, low=-2.0, high=2.0)
                    for name, counts in statistics.histograms().items()
                },
                done,
            )
            warmup_steps = config.optim.warmup_steps
            for line in alarms(statistics, config.adam_monitor, warmup_steps=warmup_steps):
                self._record("alarm", done - 1, line)

    def close(self) -> None:
        """End the threads in the background."""
        self._stragglers.close()

    def log(self, done: int) -> None:
        """Log the steps since the last log line; every rank calls this."""
        job, config = self._job, self._job.config
        spent = job.sections.read()
        seconds = spent["data"] + spent["step"]
        self.state = self.state.with_seconds(seconds)
        t = done - 1
        values = self._report.read(
            self.state.tokens,
            lr=lr(config.optim, t, config.steps),
            seconds=seconds,
            waited=spent["data"],
        )
        for source, epochs in enumerate(job.loader.mixture.epochs(self._rows.first(t))):
            values[f"progress/epoch_of_{source}" if source else "progress/epoch"] = epochs
        values["progress/batch_size"] = float(config.data.batch.at(t))
        values |= job.lifetime(self.state)
        self._metrics.log(values, done)
        logger.info(
            "%s",
            step_line(
                values,
                done,
                T=config.steps,
                tokens_left=config.data.tokens_of(config.steps) - config.data.tokens_of(done),
            ),
        )

    def _record_skipped(self, step: StepMetrics) -> None:
        """Record a step that updated nothing: its rows, and the bad losses by rank and exit."""
        rows = self._rows.at(step.t)
        first, last = int(rows[0]), int(rows[-1])
        found = [
            f"rank {rank}: {text}"
            for rank, texts in enumerate(self._job.runtime.gather(step.local_bad_losses()))
            for text in texts
        ] or [_why_skipped(step)]
        self._job.events.append("update_skipped", step.t, rows=(first, last + 1), found=found)
        if self._job.runtime.is_main:
            logger.warning(
                "step %d updates nothing (rows %d to %d): %s",
                step.t + 1,
                first,
                last,
                "; ".join(found),
            )

    def _record(self, kind: str, t: int, text: str) -> None:
        self._job.events.append(kind, t, reason=text)
        if self._job.runtime.is_main:
            logger.warning("step %d: %s", t + 1, text)


def _why_skipped(step: StepMetrics) -> str:
    """Return why a step without a bad loss has updated nothing."""
    if not step.exit_losses:
        return "no token of the batch has a label, raise data.seq_len if responses lie beyond it"
    return "every loss is finite, but the gradient is not"
