"""The process around the application: its socket, its signals, connections that do nothing."""

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from inference.serving.scheduler import Scheduler

HEADER_SECONDS = 15.0
"""From the beginning of a connection to its first request."""
KEEP_ALIVE_SECONDS = 75
"""From an answer to the next request. Clients keep a connection for less, and lose no request to
one that is closed just as they send it."""
UNREAD_SECONDS = 60.0
"""How long a client may leave an answer unread."""
FLUSH_SECONDS = 10.0
"""The same, once all texts have ended and the server is to end."""
_MAX_HEADER_BYTES = 2**14
_MAX_CONNECTIONS = 512
_BACKLOG = 256
_LOG_LEVEL = logging.WARNING


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ValueError: It cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        # Names that nobody knows come as an OSError as well, with a number of their own.
        field = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        given = host if field == "host" else port
        why = str(error.strerror).partition(" (while ")[0]
        raise ValueError(f"{field}: {given}, {why}, give another --{field}") from None
    except OverflowError:
        raise ValueError(f"port: {port}, give 0 to 65535") from None


class BoundedProtocol(H11Protocol):
    """HTTP that closes a connection with no request, or an unread answer, for some time."""

    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection."""
        super().connection_made(transport)
        self._expect_request(HEADER_SECONDS)

    def on_response_complete(self) -> None:
        """Start it again with the end of each answer."""
        super().on_response_complete()
        self._expect_request(KEEP_ALIVE_SECONDS)

    def _expect_request(self, seconds: float) -> None:
        before = self.cycle

        def close_if_none_came() -> None:
            if self.cycle is before and not self.transport.is_closing():
                self.transport.abort()  # what is not sent by now will not be read

        self.loop.call_later(seconds, close_if_none_came)

    def pause_writing(self) -> None:
        """Start another clock where the client reads more slowly than tokens come."""
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop it: the client has read on."""
        super().resume_writing()
        self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        super().connection_lost(exc)
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self._unread is not None:
            self._unread.cancel()


class Server(uvicorn.Server):
    """A server that a signal ends once the requests it has are answered, and a second at once.

    Args:
        app: The application.
        scheduler: What decodes for it.
    """

    def __init__(self, app: ASGIApp, scheduler: Scheduler) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                server_header=False,
                log_level=_LOG_LEVEL,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                limit_concurrency=_MAX_CONNECTIONS,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            )
        )
        self._scheduler = scheduler
        self._signals = 0
        self._died = threading.Event()

    def die(self) -> None:
        """End with an error; called in another thread."""
        self._died.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self._signals += 1
        if self._signals > 1:
            print("ended at once", file=sys.stderr, flush=True)
            os._exit(128 + sig)  # the decoding thread is in the middle of a round
        self._scheduler.drain()
        name = signal.Signals(sig).name
        print(f"{name}: finishing what runs; once more ends at once", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end, ten times a second."""
        # Connections close with their last answer, so that none is cut.
        drained = self._signals > 0 and self._scheduler.idle
        if drained or self._died.is_set():
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the connections, also those of clients that read no more."""
        asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._abort_connections)
        await super().shutdown(sockets)

    def _abort_connections(self) -> None:
        for connection in [*self.server_state.connections]:
            connection.transport.abort()

    def serve_on(self, listening: socket.socket) -> None:
        """Serve until a signal.

        Raises:
            SystemExit: 1, if the decoding thread has ended.
        """
        self.run(sockets=[listening])
        if self._died.is_set():
            raise SystemExit(1)
