"""The server's routes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_rfa.serving.engine import Engine
from hf_rfa.serving.errors import RequestError, broken, invalid
from hf_rfa.serving.faults import fault_of
from hf_rfa.serving.metrics import Metrics
from hf_rfa.serving.orders import Orders
from hf_rfa.serving.replies import Reply, sent
from hf_rfa.serving.requests import AnyRequest, ChatRequest, CompletionRequest, LoadRequest
from hf_rfa.serving.sequence import Event, Finished, Sequence, Text


def create_app(engine: Engine, orders: Orders, metrics: Metrics) -> FastAPI:
    """The application; the engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    app = FastAPI(title="hf_rfa", lifespan=lifespan)
    app.add_middleware(_CountResponses, metrics=metrics)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answer(body, request, engine, orders)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(body, request, engine, orders)

    model = {
        "id": orders.name,
        "object": "model",
        "created": 0,
        "owned_by": "hf_rfa",
        "max_model_len": orders.max_length,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        orders.check_name(name)
        return model

    @app.post("/load_model")
    async def load_model(body: LoadRequest) -> Response:
        try:
            orders.check_name(body.model)
            event = {"status": "ready", "model": body.model, "cached": True}
        except RequestError as error:  # its client shows the message of an event, and only the status of a response
            event = {"status": "error", "model": body.model, "message": str(error)}
        return Response(sent(event), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if engine.alive else "stopped"}, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def _answer(body: AnyRequest, request: Request, engine: Engine, orders: Orders) -> Response:
    events: asyncio.Queue[Event] = asyncio.Queue()
    sequence = await run_in_threadpool(orders.sequence, body, partial(_put, asyncio.get_running_loop(), events))
    engine.submit(sequence)
    reply = Reply(orders.name, chat=isinstance(body, ChatRequest), usage=body.wants_usage)
    if body.stream:
        return _Stream(_lines(reply, events), ended=partial(engine.cancel, sequence))
    watcher = asyncio.create_task(_cancel_if_gone(request, engine, sequence))
    try:
        text, end = await _collect(events)
    finally:
        watcher.cancel()
        engine.cancel(sequence)
    return JSONResponse(reply.whole(text, end))


def _put(loop: asyncio.AbstractEventLoop, events: "asyncio.Queue[Event]", event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


async def _collect(events: "asyncio.Queue[Event]") -> tuple[str, Finished]:
    """The whole answer."""
    pieces = []
    while True:
        event = await events.get()
        if isinstance(event, Text):
            pieces.append(event.text)
        elif isinstance(event, Finished):
            return "".join(pieces), event
        else:
            raise broken(event.error)


async def _lines(reply: Reply, events: "asyncio.Queue[Event]") -> AsyncIterator[str]:
    """The answer as server-sent events."""
    for line in reply.first():
        yield line
    while True:
        event = await events.get()
        if isinstance(event, Text):
            yield reply.piece(event.text)
        elif isinstance(event, Finished):
            for line in reply.last(event):
                yield line
            return
        else:
            yield reply.failed(broken(event.error))
            return


class _Stream(StreamingResponse):
    """A stream of events; `ended` is called after it, also when the client has gone before its first line."""

    def __init__(self, lines: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _cancel_if_gone(request: Request, engine: Engine, sequence: Sequence) -> None:
    """Wait for the client to close its connection; the body has been read, so that nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    engine.cancel(sequence)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _malformed(request: Request, error: Exception) -> Response:
    """What is wrong with a body that is no request."""
    assert isinstance(error, RequestValidationError)
    faults = [fault | {"loc": fault["loc"][1:]} for fault in error.errors()]  # without "body"
    first = faults[0]
    field, message = None, ""
    if first["type"] == "json_invalid":
        message = f"The body is no JSON: {first['ctx']['error']}."
    elif first["type"] == "model_attributes_type" and not first["loc"]:
        message = (
            "The body must be a JSON object, sent with the header `Content-Type: application/json`. Got the content "
            f"type {request.headers.get('content-type', 'none')!r}."
        )
    else:
        field, message = fault_of(faults, error.body)
    return await _refused(request, invalid(message, field))


async def _unknown(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(error.status_code, f"{error.detail}.", headers=dict(error.headers or {}))
    return await _refused(_, refused)


async def _failed(_: Request, error: Exception) -> Response:
    return await _refused(_, broken(error))


class _CountResponses:
    """Counts responses by route and status. A middleware of Starlette's own kind would hide that a client has gone."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.responded(route, message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
