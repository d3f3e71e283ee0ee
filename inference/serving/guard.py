"""What comes before a request is read: who may ask, by which name, and how large it may be."""

import asyncio
import hmac
import json
from collections import Counter
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from inference.serving.request_error import RequestError

MAX_BODY_BYTES = 2**20
BODY_SECONDS = 30.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing of the model."""


def refused(refusal: RequestError) -> Response:
    """Return the response that refuses a request."""
    return Response(
        json.dumps(refusal.content()),
        status_code=refusal.status,
        headers=refusal.headers(),
        media_type="application/json",
    )


class Guard:
    """Refuses requests without the key or, where there is none, by a foreign name of the host.

    A page of another site can have its own name point at this machine (DNS rebinding), and is then
    of the same origin as the server for a browser. It cannot read the key, nor change the Host
    header; so that one is checked where there is no key.

    Args:
        app: What is guarded.
        key: Of clients; None: there is none.
        hosts: Names by which the server is called, without a key.
        counts: Requests refused, by status.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, hosts: Collection[str], counts: Counter[int]
    ) -> None:
        self._app, self._key, self._hosts = app, key, frozenset(hosts)
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        refusal = self._why_not(Request(scope))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        self._counts[refusal.status] += 1
        await refused(refusal)(scope, receive, send)

    def _why_not(self, request: Request) -> RequestError | None:
        if self._key is None:
            if _host_of(request.headers.get("host", "")) in self._hosts:
                return None
            return RequestError(
                421, "host: call the server by the name it listens at, or give it a key"
            )
        if request.scope["path"] in _OPEN:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self._key.encode()):
            return None
        return RequestError(
            401, "the key is missing or wrong, send it as Bearer", code="invalid_api_key"
        )


def _host_of(header: str) -> str:
    """Return a Host header without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]


async def read_body(request: Request) -> bytes:
    """Return the body of a request, of which no more is kept than is allowed.

    Raises:
        RequestError: It is not JSON by its type, too large or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no page of another site can send
        raise RequestError(415, "content-type: send application/json")
    too_large = RequestError(413, f"body: more than {MAX_BODY_BYTES} bytes, send fewer")
    declared = request.headers.get("content-length", "0")
    if len(declared) > 10 or int(declared) > MAX_BODY_BYTES:  # the parser of HTTP lets digits pass
        raise too_large
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            408, f"body: not sent within {BODY_SECONDS:g} s, send it again"
        ) from None
    except ClientDisconnect:
        raise RequestError(400, "body: the client has gone") from None
    return body
