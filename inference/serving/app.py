"""The paths of the server, on FastAPI: OpenAI's completions, health, metrics and a page."""

import asyncio
import base64
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from inference.engine.row_draws import RowDraw
from inference.loading.run import Run
from inference.serving.answers import Answer, failed
from inference.serving.completion_request import CompletionRequest, read_request
from inference.serving.guard import read_body, refused
from inference.serving.job import Event, Job, Text
from inference.serving.metrics import CONTENT_TYPE
from inference.serving.named_strategies import NamedStrategies
from inference.serving.reply import Reply
from inference.serving.request_error import RequestError, wrong
from inference.serving.scheduler import Scheduler
from inference.text.stream import encode_prompt


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves."""

    run: Run
    name: str
    """Of the model."""
    slots: int
    """Most tokens of a text, its prompt included."""
    strategies: NamedStrategies
    scheduler: Scheduler


def build_app(served: Served) -> FastAPI:
    """Return the application, without its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    paths = _Paths(served)
    for path, answer in (
        ("/", paths.page),
        ("/health", paths.health),
        ("/metrics", paths.metrics),
        ("/v1/models", paths.models),
        ("/v1/models/{name:path}", paths.model),
    ):
        app.add_api_route(path, answer, methods=["GET", "HEAD"], response_class=Response)
    app.add_api_route(
        "/v1/completions", paths.completions, methods=["POST"], response_class=Response
    )

    @app.exception_handler(RequestError)
    async def _refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, RequestError)
        served.scheduler.metrics.refused[refusal.status] += 1
        return refused(refusal)

    @app.exception_handler(HTTPException)
    async def _no_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        served.scheduler.metrics.refused[error.status_code] += 1
        message = f"{error.detail}: give GET / or /v1/models, or POST /v1/completions"
        return refused(RequestError(error.status_code, message))

    @app.exception_handler(Exception)
    async def _fail(request: Request, error: Exception) -> Response:
        return refused(RequestError(500, "the server has a fault, see its log"))

    return app


class _Paths:
    """What each path answers."""

    def __init__(self, served: Served) -> None:
        self._served, self._scheduler = served, served.scheduler
        self._page = files("inference.serving").joinpath("page.html").read_text(encoding="utf-8")
        self._policy = _content_policy(self._page)

    async def page(self) -> Response:
        headers = {"content-security-policy": self._policy, "x-content-type-options": "nosniff"}
        return HTMLResponse(self._page, headers=headers)

    async def health(self) -> Response:
        """Answer 200, or 503 while no requests are taken."""
        why = self._scheduler.refusing
        return JSONResponse({"status": why or "ok"}, status_code=503 if why else 200)

    async def metrics(self) -> Response:
        return PlainTextResponse(self._scheduler.metrics_text(), media_type=CONTENT_TYPE)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        manifest = self._served.run.manifest
        return {
            "id": self._served.name,
            "object": "model",
            "created": 0,
            "owned_by": "skipstone",
            "skipstone": {
                "step": manifest.step,
                "n_layers": manifest.model.n_layers,
                "context": self._served.slots,
            },
        }

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self._served.name:
            refusal = wrong("model", name, f"give {self._served.name}")
            raise RequestError(404, refusal.message, code="model_not_found")

    async def completions(self, request: Request) -> Response:
        """Answer whole, or in events as text comes."""
        if self._scheduler.refusing:
            raise RequestError(503, self._scheduler.refusing, retry_after=10)
        asked = read_request(await read_body(request))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        # Tokenizing a long text takes long, and so may a look at what was tuned.
        job = await asyncio.to_thread(self._job, asked)
        job.emit = emit
        answer = self._answer(asked, job)
        self._scheduler.submit(job)
        if asked.stream:
            return _Stream(self._scheduler, job, _chunks(answer, job, events))
        try:
            return await _whole(request, answer, job, events)
        finally:
            self._scheduler.leave(job)

    def _job(self, asked: CompletionRequest) -> Job:
        """Return the request with its prompts as token ids.

        Raises:
            RequestError: The model is another, or the texts do not fit it.
        """
        served = self._served
        self._check_name(asked.model)
        total = len(asked.prompts) * asked.n
        if total > served.scheduler.capacity:
            raise RequestError(400, f"n: {total} texts, give at most {served.scheduler.capacity}")
        seed = secrets.randbits(53) if asked.seed is None else asked.seed
        strategy = None if asked.strategy is None else served.strategies.named(asked.strategy)
        texts = []
        for prompt in asked.prompts:
            ids = self._ids(prompt, asked.max_tokens)
            for sample in range(asked.n):
                reply = Reply(
                    served.run.tokenizer,
                    ids,
                    limit=asked.max_tokens,
                    stop_tokens=served.run.stop_tokens,
                    stop=asked.stop,
                )
                draw = RowDraw(asked.sampling, (seed + sample) % 2**64)
                texts.append(Text(ids, asked.max_tokens, draw, reply))
        return Job(texts, strategy, lambda event: None)

    def _ids(self, prompt: str | list[int], max_tokens: int) -> list[int]:
        run, slots = self._served.run, self._served.slots
        ids = encode_prompt(run, prompt) if isinstance(prompt, str) else prompt
        vocab_size = run.model.config.vocab_size
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise wrong("prompt", outside[0], f"give token ids from 0 to {vocab_size - 1}")
        room = slots - len(ids)
        if room < 1:
            raise RequestError(400, f"prompt: {len(ids)} tokens, give at most {slots - 1}")
        if max_tokens > room:
            raise wrong(
                "max_tokens", max_tokens, f"a prompt of {len(ids)} tokens leaves room for {room}"
            )
        return ids

    def _answer(self, asked: CompletionRequest, job: Job) -> Answer:
        decode = self._served.run.tokenizer.decode
        prompts = [job.texts[i * asked.n].prompt for i in range(len(asked.prompts))]
        echoed = [
            "" if not asked.echo else prompt if isinstance(prompt, str) else decode(prompt)
            for prompt in asked.prompts
        ]
        return Answer(
            job,
            model=self._served.name,
            echoed=[text for text in echoed for _ in range(asked.n)],
            prompt_tokens=sum(map(len, prompts)),
            include_usage=asked.include_usage,
        )


class _Stream(StreamingResponse):
    """Events; the request leaves the batch when they end or the client goes, whichever is first."""

    def __init__(self, scheduler: Scheduler, job: Job, chunks: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._scheduler, self._job = scheduler, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._scheduler.leave(self._job)


async def _chunks(answer: Answer, job: Job, events: "asyncio.Queue[Event]") -> AsyncIterator[str]:
    """Yield the events of a request up to the end of its last text."""
    left = len(job.texts)
    while left:
        part = await events.get()
        if isinstance(part, RequestError):
            yield failed(part)
            return
        left -= part.ending is not None
        yield answer.chunk(part)
    yield answer.end()


async def _whole(
    request: Request, answer: Answer, job: Job, events: "asyncio.Queue[Event]"
) -> Response:
    """Return the answer in one piece, or give up as soon as the client has gone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        events.put_nowait(RequestError(499, "the client has gone"))

    watching = asyncio.create_task(watch())
    try:
        parts, left = [], len(job.texts)
        while left:
            part = await events.get()
            if isinstance(part, RequestError):
                raise part
            parts.append(part)
            left -= part.ending is not None
    finally:
        watching.cancel()
    return Response(json.dumps(answer.whole(parts)), media_type="application/json")


def _content_policy(page: str) -> str:
    """Return the policy under which a browser runs the page: its own script, and no other site."""
    found = {}
    for kind in ("script", "style"):
        [text] = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        found[kind] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {found['script']}; style-src {found['style']}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
