"""What the server counts, in the text format that Prometheus reads."""

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import TypeVar

K = TypeVar("K")


_WINDOW_SECONDS = 10.0
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Seconds, by how many were at most so many."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(_BUCKETS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples."""
        total = 0
        for bound, count in zip((*_BUCKETS, math.inf), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{_number(bound)}"}} {total}'
        yield f"{name}_sum {_number(self._sum)}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts since the start, and rates over the last seconds; written by the decoding thread."""

    def __init__(self) -> None:
        self.prompt_tokens = self.tokens = self.drafted = self.accepted = self.rounds = 0
        self.ended = Counter({"stop": 0, "length": 0, "left": 0, "failed": 0})
        """Texts by how they ended: stop, length, left (the client has gone), failed."""
        self.refused: Counter[int] = Counter()
        """Requests by status."""
        self.first_text, self.whole_text = Histogram(), Histogram()
        self._recent: deque[tuple[float, int, int, int]] = deque()
        """Time, tokens, drafted and accepted of the rounds of the last seconds."""

    def add_round(self, tokens: int, drafted: int, accepted: int) -> None:
        """Count a round of all its texts."""
        self.rounds += 1
        self.tokens += tokens
        self.drafted += drafted
        self.accepted += accepted
        now = time.monotonic()
        self._recent.append((now, tokens, drafted, accepted))
        while self._recent[0][0] < now - _WINDOW_SECONDS:
            self._recent.popleft()

    def text(self, running: int, waiting: int) -> str:
        """Return all of it.

        Args:
            running: Texts that are being continued.
            waiting: Texts in the queue.
        """
        since = time.monotonic() - _WINDOW_SECONDS
        recent = [each for each in self._recent.copy() if each[0] >= since]
        tokens, drafted, accepted = (sum(each[i] for each in recent) for i in (1, 2, 3))
        gauges = {
            "requests_running": ("Texts that are being continued.", running),
            "requests_waiting": ("Texts in the queue.", waiting),
            "tokens_per_second": (
                f"New tokens per second of the last {_WINDOW_SECONDS:g} s.",
                tokens / _WINDOW_SECONDS,
            ),
            "acceptance_rate": (
                f"Accepted over drafted tokens of the last {_WINDOW_SECONDS:g} s.",
                accepted / drafted if drafted else math.nan,
            ),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts.", self.prompt_tokens),
            "generation_tokens": ("New tokens.", self.tokens),
            "drafted_tokens": ("Tokens drafted.", self.drafted),
            "accepted_tokens": ("Drafted tokens accepted.", self.accepted),
            "rounds": ("Rounds of decoding, of all texts at once.", self.rounds),
        }
        lines: list[str] = []
        for name, (summary, value) in gauges.items():
            lines += _head(name, "gauge", summary) + [f"skipstone_{name} {_number(value)}"]
        for name, (summary, value) in counters.items():
            name = f"{name}_total"
            lines += _head(name, "counter", summary) + [f"skipstone_{name} {_number(value)}"]
        ended = "Texts by how they ended: stop, length, left (the client has gone), failed."
        lines += _by_label("texts_total", "ended", ended, self.ended)
        lines += _by_label("refused_total", "status", "Requests refused.", self.refused)
        for name, summary, histogram in (
            ("first_text_seconds", "From a request to its first tokens.", self.first_text),
            ("text_seconds", "From a request to the end of a text.", self.whole_text),
        ):
            lines += [*_head(name, "histogram", summary), *histogram.lines(f"skipstone_{name}")]
        return "\n".join([*lines, ""])


def _by_label(name: str, label: str, summary: str, counts: Mapping[K, int]) -> list[str]:
    samples = sorted((str(value), count) for value, count in dict(counts).items())
    return _head(name, "counter", summary) + [
        f'skipstone_{name}{{{label}="{value}"}} {count}' for value, count in samples
    ]


def _head(name: str, kind: str, summary: str) -> list[str]:
    return [f"# HELP skipstone_{name} {summary}", f"# TYPE skipstone_{name} {kind}"]


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "+Inf" if math.isinf(value) else f"{value:.10g}"
