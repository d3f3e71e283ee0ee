"""Rows are read in order, none twice, none left out, whatever changes while they are read."""

import json
from collections import Counter
from dataclasses import asdict
from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch_ramp import BatchRamp
from data.loader import TokenLoader
from data.mixture import PERIOD, Mixture
from data.reading import Reading, Source, begin, open_mixture, reading_from_dict
from data.shards import TokenStream
from data.step_rows import StepRows
from data.windows import StreamWindows

SEGMENTS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.sampled_from([1, 2, 3])),
    min_size=1,
    max_size=5,
)
"""Steps, rows per rank, ranks."""


def windows_of(size: int) -> StreamWindows:
    return StreamWindows(TokenStream([np.arange(2 * size + 1, dtype=np.uint32)]), 2)


@settings(max_examples=60, deadline=None)
@given(segments=SEGMENTS, size=st.integers(1, 40), skipped=st.lists(st.integers(0, 60)))
def test_any_batch_sizes_and_ranks_read_every_row_once_in_the_order_of_the_permutation(
    segments: list[tuple[int, int, int]], size: int, skipped: list[int]
) -> None:
    mixture = Mixture([windows_of(size)], seed=3)
    ranges = tuple((first, first + 3) for first in skipped)
    step, read, found = 0, 0, []
    for steps, rows_per_rank, ranks in segments:
        rows = StepRows(step, read, BatchRamp(rows_per_rank * ranks), ranges)
        for t in range(step, step + steps):
            batch = {}
            for rank in range(ranks):
                loader = TokenLoader(
                    mixture,
                    global_batch_size=rows_per_rank * ranks,
                    microbatch_size=1,
                    rank=rank,
                    world_size=ranks,
                )
                for microbatch in loader.batch(rows.at(t)):
                    batch[int(microbatch.samples[0])] = int(microbatch.tokens[0, 0]) // 2
            assert sorted(batch) == list(range(rows_per_rank * ranks))
            found += [batch[sample] for sample in sorted(batch)]
        step, read = step + steps, rows.before(step + steps)
    # Slowly: count the rows one by one, and draw a permutation for each epoch.
    expected, epoch, left = [], -1, []
    for row in count():
        if len(expected) == len(found):
            break
        if not left:
            epoch += 1
            left = mixture.locate(np.arange(epoch * size, (epoch + 1) * size))[1].tolist()
            assert sorted(left) == list(range(size))
        window = left.pop(0)
        if not any(first <= row < stop for first, stop in ranges):
            expected.append(window)
    assert found == expected


def source(name: str, size: int) -> Source:
    """Return a source of so many tokens, each its own position."""
    stream = TokenStream([np.arange(size + 1, dtype=np.uint32)])
    return Source(name, name, lambda packing, seq_len: StreamWindows(stream, seq_len))


SIZES = {"a": 24, "b": 60, "c": 36}
MIXTURES = st.lists(
    st.tuples(
        st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True),
        st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=3, max_size=3),
        st.integers(0, 90),
    ),
    min_size=1,
    max_size=6,
)
"""Names of the sources, their weights, and the rows then read."""


@settings(max_examples=200, deadline=None)
@given(mixtures=MIXTURES)
def test_each_source_goes_on_where_it_was_whatever_it_is_mixed_with(
    mixtures: list[tuple[list[str], list[float], int]],
) -> None:
    reading: Reading | None = None
    row, seen = 0, {name: [] for name in SIZES}
    for names, weights, rows in mixtures:
        sources = [source(name, SIZES[name]) for name in names]
        wanted = begin(sources, weights[: len(names)], "stream", 4)
        if reading is None:
            reading = wanted
        elif not reading.mixed_as(wanted):
            reading = reading.before(row, 7).of(wanted)
        reading = reading_from_dict(json.loads(json.dumps(asdict(reading))))
        mixture = open_mixture(reading, sources, seed=7)
        for s, window in zip(*mixture.locate(np.arange(row, row + rows)), strict=True):
            seen[names[int(s)]].append(int(window))
        row += rows
    for name, windows in seen.items():
        size = SIZES[name] // 4
        epochs = [windows[at : at + size] for at in range(0, len(windows), size)]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=2, max_size=4), data=st.data()
)
def test_what_is_left_of_an_epoch_is_read_in_windows_of_another_length(
    lengths: list[int], data: st.DataObject
) -> None:
    tokens = 48
    sources = [source("a", tokens)]
    reading = begin(sources, (), "stream", lengths[0])
    row, read = 0, Counter()
    for seq_len in lengths:
        wanted = begin(sources, (), "stream", seq_len)
        if not reading.mixed_as(wanted):
            reading = reading.before(row, 5).of(wanted)
        mixture = open_mixture(reading, sources, seed=5)
        left = [
            i
            for i in range(tokens // seq_len)
            if 2 * sum(read[p] > 0 for p in range(i * seq_len, (i + 1) * seq_len)) <= seq_len
            and any(not read[p] for p in range(i * seq_len, (i + 1) * seq_len))
        ]
        # All of them once, before any window of the next epoch.
        ahead = mixture.locate(np.arange(row, row + len(left) + tokens // seq_len))[1].tolist()
        assert sorted(ahead[: len(left)]) == left
        assert sorted(ahead[len(left) :]) == list(range(tokens // seq_len))
        rows = data.draw(st.integers(0, max(len(left) - 1, 0)))
        for i in ahead[:rows]:
            read.update(range(i * seq_len, (i + 1) * seq_len))
        row += rows


def test_windows_that_are_cut_in_parts_lose_and_repeat_nothing() -> None:
    sources = [source("a", 96)]
    reading = begin(sources, (), "stream", 8)
    first = open_mixture(reading, sources, seed=5).locate(np.arange(7))[1]
    reading = reading.before(7, 5).of(begin(sources, (), "stream", 2))
    rest = open_mixture(reading, sources, seed=5).locate(np.arange(7, 7 + 20))[1]
    tokens = [8 * int(i) + j for i in first for j in range(8)]
    tokens += [2 * int(i) + j for i in rest for j in range(2)]
    assert sorted(tokens) == list(range(96))


def test_a_new_source_starts_at_0_and_one_that_returns_goes_on() -> None:
    a, b = source("a", 24), source("b", 60)
    alone = begin([a], (), "stream", 4)
    both = alone.before(4, 7).of(begin([b, a], (), "stream", 4))
    assert [(s.fingerprint, s.key, s.stretches[-1].turns) for s in both.sources] == [
        ("b", 1, 0),
        ("a", 0, 4),
    ]
    without = both.before(4 + PERIOD, 7).of(begin([b], (), "stream", 4))
    assert [s.fingerprint for s in without.absent] == ["a"]
    again = without.before(4 + PERIOD + 9, 7).of(begin([a], (), "stream", 4))
    assert again.sources[0].stretches[-1].turns == 4 + both.rows_per_period[1]
    assert [s.stretches[-1].turns for s in again.absent] == [both.rows_per_period[0] + 9]
