"""What the server's OpenAPI schema says about requests and answers, which FastAPI does not see by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

_Schema = dict[str, Any]

_MEANINGS = {
    400: "The request cannot be used.",
    401: "A key is needed.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to try again.",
    503: "The server is stopping, or the request did not begin in time.",
}


def _object(**properties: _Schema) -> _Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list_of(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_OR_NULL: _Schema = {"type": ["object", "null"]}
_ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
)
_USAGE = _object(
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
    prompt_tokens_details=_object(cached_tokens=_COUNT),
)
_REASON: _Schema = {"enum": ["stop", "length"]}
MODEL = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT)
MODELS = _object(object={"const": "list"}, data=_list_of(MODEL))


def _answer(kind: str, **choice: _Schema) -> _Schema:
    choices = _list_of(_object(index=_COUNT, finish_reason=_REASON, logprobs=_OR_NULL, **choice))
    return _object(id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=choices, usage=_USAGE)


COMPLETION = _answer("text_completion", text=_TEXT)
CHAT_COMPLETION = _answer("chat.completion", message=_object(role={"const": "assistant"}, content=_TEXT))


def described(
    *statuses: int, answer: _Schema | None = None, kind: str = "application/json", streams: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The answers of a path: its errors, and what it gives.

    Args:
        statuses: of errors.
        answer: schema of what it gives; None = anything of that kind.
        kind: media type of that.
        streams: server-sent events too.
    """
    errors = {"application/json": {"schema": _ERROR}}
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": _MEANINGS[status], "content": errors} for status in statuses
    }
    kinds: dict[str, Any] = {kind: {} if answer is None else {"schema": answer}}
    description = "What was asked for."
    if streams:
        kinds["text/event-stream"] = {}
        description = "The text, or its events where `stream` is true."
    return found | {200: {"description": description, "content": kinds}}


def describe_requests(app: FastAPI, bodies: Mapping[str, type[BaseModel]], *, model: str, wants_key: bool) -> None:
    """Bodies are read by `parse_body` and keys before any path, so FastAPI knows of neither.

    Args:
        bodies: path -> its body.
        model: the one name that bodies may give.
        wants_key: whether anything but /health needs one.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = schema.setdefault("components", {})
            known = components.setdefault("schemas", {})
            for path, kind in bodies.items():
                body = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                known |= body.pop("$defs", {})
                body["properties"]["model"]["enum"] = [model]
                known[kind.__name__] = body
                content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
                schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
            if wants_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in schema["paths"].items():
                    for method in methods.values() if path != "/health" else ():
                        method["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
