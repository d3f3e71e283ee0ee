"""The decoding thread: requests wait in a queue, join the batch, and leave it as they end.

One thread owns the model. Texts of the server's own strategy share one batch, greedy and sampled
side by side; a strategy that requests name has a batch of its own while they are there. In each
turn waiting texts join where rows are free, in the order of their arrival, and every batch that has
texts runs one round.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from inference.engine.generation import Emission
from inference.engine.open_batch import OpenBatch
from inference.engine.strategy import Strategy
from inference.serving.job import Event, Job, Progress
from inference.serving.metrics import Metrics
from inference.serving.request_error import RequestError
from inference.strategies.registry import describe

logger = logging.getLogger(__name__)

MOST_OTHERS = 2
"""Batches of strategies that requests name, at once; each takes as much memory as the first."""
_OWN = ""


@dataclass(eq=False)
class _Group:
    """The batch of one strategy, and whose texts are in it."""

    batch: OpenBatch
    texts: dict[int, tuple[Job, int]] = field(default_factory=dict)
    """By the key in the batch, a request and the index of its text."""


class Scheduler:
    """The queue and the thread that decodes; `start` begins.

    Args:
        open_batch: Opens a batch of a strategy, or of the server's own for None.
        rows: Texts in a batch at once.
        max_queue: Most texts that wait.
        on_death: Called in the thread if it ends by an error of its own.
    """

    def __init__(
        self,
        open_batch: Callable[[Strategy | None], OpenBatch],
        *,
        rows: int,
        max_queue: int,
        on_death: Callable[[], None],
    ) -> None:
        self.capacity = rows + max_queue
        """Most texts at once, waiting ones included."""
        self.metrics = Metrics()
        self._open_batch, self._on_death = open_batch, on_death
        self._groups = {_OWN: _Group(open_batch(None))}  # its errors come before any request
        self._keys = count()
        self._waiting: list[tuple[Job, int]] = []
        self._running = 0
        self._changed = threading.Condition()
        self._refusing = ""
        """Why no request is taken; empty: they are."""
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def refusing(self) -> str:
        """Why no request is taken; empty: they are."""
        return self._refusing

    @property
    def idle(self) -> bool:
        """Whether no text runs or waits."""
        with self._changed:
            return not self._waiting and not self._running

    def metrics_text(self) -> str:
        """Return the counts, for Prometheus."""
        with self._changed:
            return self.metrics.text(self._running, len(self._waiting))

    def drain(self) -> None:
        """Take no more requests; those that are here end as usual."""
        with self._changed:
            self._refusing = self._refusing or "the server is shutting down"

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            RequestError: The queue is full, or the server takes no more requests.
        """
        with self._changed:
            if self._refusing:
                raise RequestError(503, self._refusing, retry_after=10)
            held = self._running + len(self._waiting)
            if held + len(job.texts) > self.capacity:
                message = f"the queue is full: {held} texts of at most {self.capacity}, try later"
                raise RequestError(429, message, code="queue_full", retry_after=1)
            self._waiting += [(job, index) for index in range(len(job.texts))]
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Free what a request holds, within a round; of one that has ended, that is nothing."""
        with self._changed:
            job.left = True
            self._changed.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._running:
                        self._changed.wait()
                self._drop_those_that_left()
                self._admit()
                for name in [name for name, group in self._groups.items() if group.texts]:
                    self._round(name)
        except BaseException:
            logger.exception("the decoding thread has ended")
            with self._changed:
                self._refusing = "the decoding thread has ended, start the server again"
                jobs = [job for job, _ in self._waiting]
                self._waiting.clear()
            jobs += [job for group in self._groups.values() for job, _ in group.texts.values()]
            for job in dict.fromkeys(jobs):
                self._emit(job, RequestError(500, self._refusing))
            self._on_death()

    def _drop_those_that_left(self) -> None:
        with self._changed:
            before = len(self._waiting)
            self._waiting = [entry for entry in self._waiting if not entry[0].left]
            self.metrics.ended["left"] += before - len(self._waiting)
        for group in self._groups.values():
            for key, (job, _) in [*group.texts.items()]:
                if job.left:
                    group.batch.leave(key)
                    self._end(group, key, "left")

    def _admit(self) -> None:
        """Put waiting texts into free rows; one whose strategy has none lets others pass."""
        with self._changed:
            waiting = [*self._waiting]
        for job, index in waiting:
            if job.left or (found := self._group_for(job)) is None:
                continue
            name, group = found
            if not group.batch.free:
                continue
            with self._changed:
                self._waiting.remove((job, index))
                self._running += 1
            key = next(self._keys)
            group.texts[key] = job, index
            text = job.texts[index]
            try:
                group.batch.join(key, text.prompt, limit=text.limit, draw=text.draw)
            except Exception as error:
                self._fail(name, error)
            self.metrics.prompt_tokens += len(text.prompt)

    def _group_for(self, job: Job) -> tuple[str, _Group] | None:
        """Return the batch of a request's strategy, opened where there is room; None: wait."""
        name = _OWN if job.strategy is None else describe(job.strategy)
        if name not in self._groups:
            others = [other for other in self._groups if other != _OWN]
            if len(others) >= MOST_OTHERS and name != _OWN:
                unused = [other for other in others if not self._groups[other].texts]
                if not unused:
                    return None
                del self._groups[unused[0]]
            try:
                self._groups[name] = _Group(self._open_batch(job.strategy))
            except ValueError as error:  # settings that only the model shows to be wrong
                self._refuse(job, RequestError(400, f"strategy: {name}, {error}"))
                return None
            except Exception as error:
                logger.exception("no batch could be opened")
                self._refuse(job, _failure(error))
                return None
        return name, self._groups[name]

    def _refuse(self, job: Job, refusal: RequestError) -> None:
        """End a request of which no text runs."""
        with self._changed:
            self._waiting = [entry for entry in self._waiting if entry[0] is not job]
            job.left = True
        self.metrics.ended["failed"] += len(job.texts)
        self._emit(job, refusal)

    def _round(self, name: str) -> None:
        """Run a round of a batch, and hand out what came of it."""
        group = self._groups[name]
        strategy = describe(group.batch.strategy)
        try:
            emissions = group.batch.round()
            for key, emission in emissions.items():
                self._hand_out(group, key, emission, strategy)
        except Exception as error:  # whatever it is, other requests go on
            self._fail(name, error)
            return
        self.metrics.add_round(
            sum(len(emission.tokens) for emission in emissions.values()),
            sum(emission.drafted for emission in emissions.values()),
            sum(emission.accepted for emission in emissions.values()),
        )

    def _hand_out(self, group: _Group, key: int, emission: Emission, strategy: str) -> None:
        job, index = group.texts[key]
        reply = job.texts[index].reply
        seconds = time.monotonic() - job.arrived
        if not reply.tokens:
            self.metrics.first_text.observe(seconds)
        spans = reply.push(emission)
        self._emit(job, Progress(index, spans, strategy, reply.ending))
        if reply.ending:
            group.batch.leave(key)  # a stop text ends it before the engine does
            self.metrics.whole_text.observe(seconds)
            self._end(group, key, reply.ending)

    def _end(self, group: _Group, key: int, how: str) -> None:
        del group.texts[key]
        self.metrics.ended[how] += 1
        with self._changed:
            self._running -= 1

    def _fail(self, name: str, error: Exception) -> None:
        """End all requests in a batch, which may be damaged and is given up."""
        logger.error("a round has failed", exc_info=error)
        group = self._groups.pop(name)
        for job in dict.fromkeys(job for job, _ in group.texts.values()):
            job.left = True
            self._emit(job, _failure(error))
        for key in [*group.texts]:
            self._end(group, key, "failed")

    def _emit(self, job: Job, event: Event) -> None:
        try:
            job.emit(event)
        except RuntimeError:  # the event loop is closed: the server is ending
            job.left = True


def _failure(error: Exception) -> RequestError:
    return RequestError(500, f"decoding failed ({type(error).__name__}), try again", code="failed")
