"""A request on its way through the scheduler, and what comes back of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from inference.engine.row_draws import RowDraw
from inference.engine.strategy import Strategy
from inference.serving.reply import Ending, Reply, Span
from inference.serving.request_error import RequestError


@dataclass(frozen=True)
class Progress:
    """What a round added to one continuation."""

    index: int
    """Of the continuation in its request."""
    spans: list[Span]
    strategy: str
    """That decoded it."""
    ending: Ending | None
    """Set with the last of it."""


Event = Progress | RequestError
"""A refusal ends the whole request."""


@dataclass(eq=False)
class Text:
    """One continuation that a request asks for."""

    prompt: Sequence[int]
    limit: int
    """Most new tokens."""
    draw: RowDraw
    reply: Reply


@dataclass(eq=False)
class Job:
    """A request."""

    texts: list[Text]
    strategy: Strategy | None
    """None: the server's own."""
    emit: Callable[[Event], None]
    """Takes what comes of it; called in the decoding thread."""
    left: bool = False
    """Whether the client has gone."""
    arrived: float = field(default_factory=time.monotonic)
