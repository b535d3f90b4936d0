"""An HTTP server that speaks as OpenAI's does: /v1/completions, /v1/chat/completions, /v1/models; /health, /metrics.

run(InferenceRuntime(load("runs/quickstart")), ServerSettings(name="quickstart"))
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from fusiontree.deploy.engine import ComputeThread
from fusiontree.deploy.openai_bodies import ApiError, ChatBody, CompletionBody, parse_body
from fusiontree.deploy.openai_schema import (
    CHAT_COMPLETION,
    COMPLETION,
    MODEL,
    MODELS,
    describe_requests,
    described,
)
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.server_metrics import CONTENT_TYPE
from fusiontree.deploy.service import ServerSettings, Service
from fusiontree.errors import InputError, first_line
from fusiontree.version import __version__

__all__ = ["ServerSettings", "build_app", "run"]

logger = logging.getLogger("fusiontree.server")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# In which a body must have arrived: until then it holds a connection and memory for nothing.
_BODY_S = 60.0

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")


def build_app(runtime: InferenceRuntime, settings: ServerSettings, thread: ComputeThread | None = None) -> FastAPI:
    """The application, with its `Service` as `app.state.service`; while it runs, nobody else may use `runtime`.

    Args:
        runtime, settings, thread: as of `Service`.
    """
    service = Service(runtime, settings, thread)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = FastAPI(title="FusionTree", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(_Gate, service=service)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(404, _answer_unknown)
    app.add_exception_handler(405, _answer_unknown)
    app.add_exception_handler(500, _answer_failure)
    created = int(time.time())
    model = {"id": settings.name, "object": "model", "created": created, "owned_by": "fusiontree"}

    @app.get("/health", responses={503: {"description": "It does not answer any more."}})
    async def health() -> JSONResponse:
        """Whether the server answers; needs no key."""
        well = service.engine.is_alive and not service.engine.draining
        return JSONResponse({"status": "ok" if well else "stopping"}, 200 if well else 503)

    @app.get("/metrics", response_class=Response, responses=described(401, kind="text/plain"))
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", responses=described(401, answer=MODELS))
    async def models() -> JSONResponse:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", responses=described(401, 404, answer=MODEL))
    async def model_named(name: str) -> JSONResponse:
        """The model of that name."""
        if name != settings.name:
            raise ApiError(404, f"there is no model {name[:80]!r} here", param="model", code="model_not_found")
        return JSONResponse(model)

    statuses = (400, 401, 404, 408, 413, 429, 503)

    @app.post("/v1/completions", responses=described(*statuses, answer=COMPLETION, streams=True))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await service.answer(parse_body(CompletionBody, await _body(request, settings)), request)

    @app.post("/v1/chat/completions", responses=described(*statuses, answer=CHAT_COMPLETION, streams=True))
    async def chat(request: Request) -> Response:
        """Answer in a conversation."""
        return await service.answer(parse_body(ChatBody, await _body(request, settings)), request)

    bodies: dict[str, type[BaseModel]] = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
    describe_requests(app, bodies, model=settings.name, wants_key=bool(settings.api_keys))
    return app


async def _body(request: Request, settings: ServerSettings) -> bytes:
    seconds = min(_BODY_S, settings.request_seconds)
    try:
        return await asyncio.wait_for(_read_body(request, settings), seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from error


async def _read_body(request: Request, settings: ServerSettings) -> bytes:
    most = settings.max_body_bytes
    too_large = ApiError(413, f"the body has more than the {most} bytes that are allowed here", code="body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    content = bytearray()
    is_whole = False
    while not is_whole:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ApiError(499, "the client has gone")
        content += message.get("body", b"")
        if len(content) > most:
            raise too_large
        is_whole = not message.get("more_body", False)
    return bytes(content)


class _Gate:
    """Lets nobody without a key past, but to /health; counts what is answered."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(_known_path(scope), message["status"])
            await send(message)

        if self._keys and scope["path"] != "/health" and not self._holds_key(scope):
            error = ApiError(
                401,
                "this server wants an API key: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await _refusal(error, scope)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _holds_key(self, scope: _Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), one) for one in self._keys]  # all, so that the time says nothing
        return kind.lower() == b"bearer" and any(matches)


def _known_path(scope: _Scope) -> str:
    """Without what a client has made up, which may be anything."""
    return scope["path"] if scope["path"] in _PATHS else "other"


def _refusal(error: ApiError, scope: _Scope) -> JSONResponse:
    """The answer; noted in the log, unless its request was when it ended. Not the sentence, which may quote a body."""
    if not error.is_logged:
        logger.info("refused", extra={"fields": {"path": _known_path(scope), "status": error.status}})
    return JSONResponse(error.content, error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refusal(error, request.scope)


async def _answer_unknown(request: Request, error: Exception) -> Response:
    status, headers = getattr(error, "status_code", 404), getattr(error, "headers", None)
    problem = "there is no such path" if status == 404 else f"this path does not take {request.method}"
    unknown = ApiError(status, f"{problem}; there are {', '.join(_PATHS)}", headers=dict(headers or {}))
    return _refusal(unknown, request.scope)


async def _answer_failure(request: Request, error: Exception) -> Response:
    return _refusal(ApiError(500, "the server failed on this request; its log says why"), request.scope)


class _JsonLines(logging.Formatter):
    """Each record as a JSON object of one line."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


# To send the last answers in, when the time to finish what runs is over.
_ANSWERING_S = 5


class _Server(uvicorn.Server):
    """Says when it listens, and takes nothing new once it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, address: str) -> None:
        super().__init__(config)
        self._service = service
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.info("listening", extra={"fields": {"address": self._address, "model": self._service.settings.name}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("stopping", extra={"fields": {"drain_seconds": self._service.settings.drain_seconds}})
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        engine = self._service.engine
        if not engine.draining:  # what then still runs is answered with 503
            engine.draining = True
            ending = threading.Timer(self._service.settings.drain_seconds, engine.stop)
            ending.daemon = True
            ending.start()
        super().handle_exit(sig, frame)


def run(runtime: InferenceRuntime, settings: ServerSettings, thread: ComputeThread | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs within `settings.drain_seconds`. Logs JSON to stderr.

    Args:
        runtime, settings, thread: as of `Service`.

    Raises:
        InputError: the address cannot be listened on.
    """
    listener = _listen(settings)
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("fusiontree", logging.INFO), ("uvicorn", logging.WARNING)):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = False
    app = build_app(runtime, settings, thread)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.drain_seconds + _ANSWERING_S,
    )
    # Once it has stopped, uvicorn raises the signal again, which would kill the process that just ended in order.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    _Server(config, app.state.service, f"http://{host}:{port}").run(sockets=[listener])


def _listen(settings: ServerSettings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except socket.gaierror as error:
        listener.close()
        raise InputError(f"there is no host {settings.host} to listen on ({first_line(error)})") from error
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"the server cannot listen on {settings.host}:{settings.port} ({first_line(error)}): choose another port"
        ) from error
    return listener
