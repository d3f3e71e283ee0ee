"""How far the sources of a mixture have been read, as a checkpoint holds it.

When sources, weights or windows change, each source goes on after its own last row; a new source
starts at its first. A batch size is no part of this.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from data.mixture import Mixture, shares, turns_before
from data.window_order import Change, Stretch, WindowOrder, order_after
from data.windows import Packing, Windows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A source of a mixture."""

    name: str
    """For messages."""
    fingerprint: str
    """Of its tokens: a source of the same tokens goes on."""
    open: Callable[[Packing, int], Windows]
    """Returns its windows of a packing and a length."""


@dataclass(frozen=True)
class SourceRead:
    """How far a source was read."""

    fingerprint: str
    key: int
    """Its own part of the seed."""
    stretches: tuple[Stretch, ...]
    """What was read, oldest first; the last goes on."""


@dataclass(frozen=True)
class Reading:
    """A mixture, and how far its sources were read before its first row."""

    start: int
    """The first row of the mixture."""
    rows_per_period: tuple[int, ...]
    """The share of each source."""
    sources: tuple[SourceRead, ...]
    absent: tuple[SourceRead, ...] = ()
    """Sources that were read before and are no longer part of it."""

    def before(self, row: int, seed: int) -> "Reading":
        """Return the reading of a mixture that begins at `row`, with the same sources."""
        turns = turns_before(row - self.start, self.rows_per_period, seed)
        sources = [_read_on(s, n) for s, n in zip(self.sources, turns, strict=True)]
        return replace(self, start=row, sources=tuple(sources))

    def mixed_as(self, other: "Reading") -> bool:
        """Whether the rows of both are of the same sources, windows and shares."""
        return self.rows_per_period == other.rows_per_period and [
            (s.fingerprint, s.stretches[-1].packing, s.stretches[-1].seq_len) for s in self.sources
        ] == [
            (s.fingerprint, s.stretches[-1].packing, s.stretches[-1].seq_len) for s in other.sources
        ]

    def of(self, wanted: "Reading") -> "Reading":
        """Return how far the sources of another mixture were read, those that are new not at all.

        One that is named twice is two sources.
        """
        known, sources = [*self.sources, *self.absent], []
        next_key = 1 + max(source.key for source in known)
        for source in wanted.sources:
            found = next((s for s in known if s.fingerprint == source.fingerprint), None)
            if found is None:
                found, next_key = replace(source, key=next_key), next_key + 1
            else:
                known.remove(found)
            last, now = found.stretches[-1], source.stretches[-1]
            if (last.packing, last.seq_len) != (now.packing, now.seq_len):
                found = replace(found, stretches=(*found.stretches, now))
            sources.append(found)
        return replace(wanted, start=self.start, sources=tuple(sources), absent=tuple(known))


def begin(
    sources: Sequence[Source], weights: Sequence[float], packing: Packing, seq_len: int
) -> Reading:
    """Return the reading of a mixture of which nothing is read.

    Raises:
        ValueError: a source has no window of this length, or a weight is wrong.
    """
    if not weights and len(sources) > 1:
        weights = [len(source.open(packing, seq_len)) for source in sources]
    return Reading(
        0,
        tuple(shares(weights or [1.0])),
        tuple(
            SourceRead(source.fingerprint, key, (Stretch(packing, seq_len, 0),))
            for key, source in enumerate(sources)
        ),
    )


def open_mixture(reading: Reading, sources: Sequence[Source], *, seed: int) -> Mixture:
    """Return the mixture whose sources were read so far before it; log what a change costs."""
    opened: list[Windows] = []
    orders: list[WindowOrder] = []
    for source, read in zip(sources, reading.sources, strict=True):
        *before, last = [source.open(s.packing, s.seq_len) for s in read.stretches]
        order, change = order_after(read.stretches, [*before, last], seed=seed + read.key)
        opened.append(last)
        orders.append(order)
        if change != Change():
            logger.info(
                "data: windows of %s were cut otherwise before: of the %s tokens not yet read in "
                "that epoch %s were left to the next one, and %s already read come again",
                source.name,
                f"{change.unread:,}",
                f"{change.postponed:,}",
                f"{change.repeated:,}",
            )
    return Mixture(opened, reading.rows_per_period, seed=seed, start=reading.start, orders=orders)


def reading_from_dict(fields: Mapping[str, Any]) -> Reading:
    """Rebuild a reading from `dataclasses.asdict`'s output after a round trip through JSON.

    Raises:
        KeyError, TypeError, ValueError: It is none.
    """
    sources, absent = (
        tuple(
            SourceRead(
                str(source["fingerprint"]),
                count(source["key"]),
                tuple(_stretch(stretch) for stretch in source["stretches"]),
            )
            for source in fields[name]
        )
        for name in ("sources", "absent")
    )
    share = tuple(count(rows) for rows in fields["rows_per_period"])
    if len(share) != len(sources) or not all(s.stretches for s in (*sources, *absent)):
        raise ValueError("its sources do not fit")
    shares(share)  # each positive
    return Reading(count(fields["start"]), share, sources, absent)


def _stretch(fields: Mapping[str, Any]) -> Stretch:
    if fields["packing"] not in get_args(Packing):
        raise ValueError(f"packing {fields['packing']}")
    return Stretch(fields["packing"], count(fields["seq_len"]), count(fields["turns"]))


def count(number: Any) -> int:
    """Return a number of rows, tokens or steps as it is.

    Raises:
        TypeError, ValueError, OverflowError: It is none.
    """
    if not 0 <= int(number) < 2**60:
        raise ValueError(f"{number} is no count")
    return int(number)


def _read_on(source: SourceRead, turns: int) -> SourceRead:
    last = source.stretches[-1]
    last = replace(last, turns=last.turns + turns)
    return replace(source, stretches=(*source.stretches[:-1], last))
