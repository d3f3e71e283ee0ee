"""Which rows a run goes on with: those after the last it has read, of whatever mixture it now has.

Where sources, weights or windows have changed since the checkpoint, a new mixture begins at the
next row, and each source goes on in it where it was.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from data.loader import TokenLoader
from data.mixture import PERIOD
from data.reading import Reading, SourceRead, begin, count, reading_from_dict
from data.window_order import Stretch
from train.checkpoints.resume import Resumed
from train.config.config import TrainConfig
from train.loop.corpus import Corpus, train_loader
from train.loop.data_config import DataConfig
from train.loop.run_state import RunState, run_state_from_dict
from train.parallel.runtime import Runtime
from train.run_folder.events import Event, EventLog

logger = logging.getLogger(__name__)


def open_rows(
    config: TrainConfig, runtime: Runtime, corpus: Corpus, resumed: Resumed, events: EventLog
) -> tuple[RunState, TokenLoader]:
    """Return the state to go on from, and the loader of the rows that follow.

    Raises:
        ValueError: On rank 0, if they cannot be had.
        SystemExit: On the other ranks then.
    """
    data, seed = config.data, config.seed
    warn_of_another_seed(resumed, seed)
    recorded = runtime.gather(events.read() if runtime.is_main else [])[0]

    def open_loader() -> tuple[RunState, TokenLoader]:
        state = resumed_state(resumed, recorded, data)
        state = with_reading(state, resumed, corpus, data, seed)
        assert state.reading is not None
        loader = train_loader(
            corpus,
            data,
            runtime,
            seed,
            reading=state.reading,
            next_row=state.next_row,
            rows=data.batch.before(config.steps) - data.batch.before(resumed.t),
        )
        return state, loader

    return runtime.on_every_rank(open_loader)


def warn_of_another_seed(resumed: Resumed, seed: int) -> None:
    """Log that the order of the data changes with the seed, which no count of rows can mend."""
    before = resumed.manifest.config.get("seed", seed) if resumed.manifest else seed
    if before != seed:
        logger.info(
            "data: seed was %s, is %s: the rest of this epoch is drawn anew, some of its windows "
            "come again and as many are left out, keep the seed to read each once",
            before,
            seed,
        )


def checkpoint_state(resumed: Resumed) -> RunState:
    """Return the state of a checkpoint; where there is none, that of a new run.

    Raises:
        ValueError: If the checkpoint holds none.
    """
    if resumed.manifest is None:
        return RunState()
    data = resumed.manifest.config.get("data")
    return run_state_from_dict(resumed.state, step=resumed.t, data=data)


def resumed_state(resumed: Resumed, events: Sequence[Event], config: DataConfig) -> RunState:
    """Return the state of the checkpoint, without the rows skipped by rollbacks since.

    Args:
        resumed: The checkpoint.
        events: Of the run, as rank 0 reads them.
        config: Sizes the batches that version 0.1 has skipped in a run without a checkpoint.
    """
    state = checkpoint_state(resumed)
    if resumed.branched_from:
        state = replace(state, origin=(resumed.branched_from, resumed.t), productive_seconds=0.0)
    data = resumed.manifest.config["data"] if resumed.manifest else {}
    size = data.get("global_batch_size", config.global_batch_size)
    skipped, readings = _rolled_back(events, size)
    state = state.skipping(skipped)
    # A rollback to before the mixture has changed, and no checkpoint since.
    readings += [state.reading] if state.reading else []
    readings = [found for found in readings if found.start <= state.next_row]
    return replace(state, reading=max(readings, key=lambda found: found.start, default=None))


def with_reading(
    state: RunState, resumed: Resumed, corpus: Corpus, config: DataConfig, seed: int
) -> RunState:
    """Return the state with the mixture that the run goes on with.

    Raises:
        ValueError: If a source has no rows, or the checkpoint does not tell how far one was read.
    """
    wanted = corpus.unread(config)
    before = state.reading
    if before is None:
        before = _reading_of_0_1(resumed, corpus, config) if resumed.manifest else wanted
    if before.mixed_as(wanted):
        return replace(state, reading=before)
    row = state.next_row
    # Beyond every range that is skipped: those are rows of another mixture.
    start = max([row, *(stop for _, stop in state.skipped_rows)])
    reading = replace(before.before(row, seed).of(wanted), start=start)
    return replace(state.skipping([(row, start)] if start > row else []), reading=reading)


def _rolled_back(
    events: Sequence[Event], batch_size: int
) -> tuple[list[tuple[int, int]], list[Reading]]:
    """Return the rows that rollbacks have skipped, and the mixtures they went back to."""
    skipped, readings = [], []
    for event in events:
        if event["kind"] != "rollback":
            continue
        try:
            rows = _skipped_rows(event, batch_size)
            found = [reading_from_dict(event["reading"])] if event.get("reading") else []
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            line = "events: the rollback from step %s cannot be read (%r), its rows are not skipped"
            logger.warning(line, event["step"], error)
            continue
        skipped.append(rows)
        readings += found
    return skipped, readings


def _skipped_rows(event: Event, batch_size: int) -> tuple[int, int]:
    unit = 1 if "skipped_rows" in event else batch_size  # batches, in version 0.1
    first, stop = map(count, event["skipped_rows" if unit == 1 else "skipped"])
    return first * unit, stop * unit


def _reading_of_0_1(resumed: Resumed, corpus: Corpus, config: DataConfig) -> Reading:
    """Return the mixture of a checkpoint of version 0.1, which names the sources together."""
    assert resumed.manifest is not None
    data, fingerprint = resumed.manifest.config["data"], resumed.manifest.data_fingerprint
    packing, seq_len = data.get("packing", "stream"), data["seq_len"]
    if not data.get("also"):
        source = SourceRead(fingerprint, 0, (Stretch(packing, seq_len, 0),))
        return Reading(0, (PERIOD,), (source,))
    if fingerprint != corpus.fingerprint:
        raise ValueError(
            f"data.also: the checkpoint of step {resumed.t}, of version 0.1, does not tell the "
            "rows of its sources apart, resume with those until the next checkpoint, then change "
            "them"
        )
    return begin(corpus.sources, data.get("weights", ()), packing, seq_len)
