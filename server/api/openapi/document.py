"""The OpenAPI document: what FastAPI knows of the routes, and what it cannot see: replies, streams, errors, the key.

`OPERATIONS` says it, one entry a path. A path without one keeps what FastAPI wrote; `tests/fuzz` finds it then.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from fastapi import FastAPI, Response
from prerope.server import errors
from prerope.server.api.keys import OPEN_PATHS
from prerope.server.api.openai.schemas import ChatRequest, CompletionRequest
from prerope.server.api.openapi import openai_replies as openai
from prerope.server.api.openapi import replies
from prerope.server.api.requests.schemas import GenerateRequest, MapRequest
from prerope.server.api.requests.tokenize import DetokenizeRequest, TokenizeRequest
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

PATH = "/openapi.json"
REF = "#/components/schemas/{model}"


class Operation(NamedTuple):
    """reply: a model, or the media type of a reply that is no JSON. events: of its stream, if it has one.
    errors: beside those that every operation of its kind may meet. body: what is sent, if anything."""

    reply: type[BaseModel] | str
    errors: Sequence[type[errors.RequestError]] = ()
    events: Sequence[type[BaseModel]] = ()
    body: type[BaseModel] | None = None


NOT_READY = (errors.EngineUnavailable,)
MODEL = (*NOT_READY, errors.ModelNotFound)
QUEUE = (errors.QueueFull, errors.DeadlineExceeded)

OPERATIONS: dict[str, Operation] = {
    "/generate": Operation(
        replies.GenerateReply,
        (*NOT_READY, *QUEUE),
        (replies.GeneratePiece, replies.GenerateProgress, replies.GenerateEnd),
        GenerateRequest,
    ),
    "/v1/completions": Operation(
        openai.CompletionReply, (*MODEL, *QUEUE), (openai.CompletionChunk,), CompletionRequest
    ),
    "/v1/chat/completions": Operation(openai.ChatReply, (*MODEL, *QUEUE), (openai.ChatChunk,), ChatRequest),
    "/v1/chat/completions/render": Operation(replies.RenderReply, (*MODEL, errors.QueueFull), body=ChatRequest),
    "/v1/completions/render": Operation(replies.RenderReplies, (*MODEL, errors.QueueFull), body=CompletionRequest),
    "/v1/models": Operation(replies.ModelList, NOT_READY),
    "/v1/models/{model}": Operation(replies.ModelCard, MODEL),
    "/tokenize": Operation(replies.TokenizeReply, (*MODEL, errors.QueueFull), body=TokenizeRequest),
    "/detokenize": Operation(replies.DetokenizeReply, (*MODEL, errors.QueueFull), body=DetokenizeRequest),
    "/tokenizer_info": Operation(replies.TokenizerInfoReply, NOT_READY),
    "/rope/methods": Operation(replies.MethodsReply, NOT_READY),
    "/rope/map": Operation(replies.MapReply, (*NOT_READY, errors.QueueFull), body=MapRequest),
    "/live": Operation(replies.HealthReply),
    "/health": Operation(replies.HealthReply, NOT_READY),
    "/version": Operation(replies.VersionReply),
    "/ready": Operation(replies.ReadyReply, NOT_READY),
    "/metrics": Operation("text/plain"),
}

HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "required": True}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 0}, "required": True, "description": "Seconds."}},
    503: {"Retry-After": {"schema": {"type": "integer", "minimum": 0}, "required": True, "description": "Seconds."}},
}


def install_document(app: FastAPI, *, needs_key: bool) -> None:
    """Make `app` serve the completed document. Call it once all routes are there.

    (FastAPI's own route writes it anew for each request, 7 ms on the event loop.)
    """
    made_by_fastapi = app.openapi

    @cache
    def document() -> dict[str, Any]:
        return _complete(made_by_fastapi(), needs_key=needs_key)

    @cache
    def text() -> bytes:
        return json.dumps(document(), ensure_ascii=False, separators=(",", ":")).encode()

    async def serve() -> Response:
        return Response(text(), media_type="application/json")

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to change it
    app.add_api_route(PATH, serve, include_in_schema=False)


def _complete(document: dict[str, Any], *, needs_key: bool) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's 422, which `error_replies` makes a 400
        schemas.pop(unused, None)
    schemas.update(_reply_schemas())
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in document["paths"].items():
        for described in item.values():
            described["responses"].pop("422", None)
            if path in OPERATIONS:
                _describe(described, OPERATIONS[path], closed=needs_key and path not in OPEN_PATHS)
    return document


def _describe(described: dict[str, Any], operation: Operation, *, closed: bool) -> None:
    kinds: list[type[errors.RequestError]] = [errors.EngineFailure, *operation.errors]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(operation.body)}}}
        kinds += [errors.InvalidRequest, errors.BodyTooLarge, errors.BodyTimeout]
    if closed:
        kinds.append(errors.Unauthorized)
        described["security"] = [{"key": []}]
    responses = described["responses"]
    responses["200"]["content"] = _content(operation)
    for kind in sorted(kinds, key=lambda kind: kind.status):
        responses[str(kind.status)] = _error_response(kind)


def _content(operation: Operation) -> dict[str, Any]:
    if isinstance(operation.reply, str):
        return {operation.reply: {"schema": {"type": "string"}}}
    content: dict[str, Any] = {"application/json": {"schema": _ref(operation.reply)}}
    if operation.events:
        content["text/event-stream"] = {"itemSchema": _event_schema(operation.events)}
    return content


def _event_schema(events: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The schema of one server-sent event: JSON, at the end `[DONE]`, or an error and no end."""

    def event(name: str, data: dict[str, Any]) -> dict[str, Any]:
        return {"type": "object", "required": ["data"], "properties": {"event": {"const": name}, "data": data}}

    def carried(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
        schema = {"anyOf": [_ref(model) for model in models]}
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}

    return {
        "anyOf": [
            event("message", carried(events)),
            event("message", {"const": "[DONE]"}),
            event("error", carried([replies.ErrorReply])),
        ]
    }


def _error_response(kind: type[errors.RequestError]) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "content": {"application/json": {"schema": _ref(replies.ErrorReply)}},
    }
    if kind.status in HEADERS:
        response["headers"] = HEADERS[kind.status]
    return response


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def _reply_schemas() -> dict[str, Any]:
    models: list[type[BaseModel]] = [replies.ErrorReply]
    for operation in OPERATIONS.values():
        models += [operation.reply] if not isinstance(operation.reply, str) else []
        models += [*operation.events, *([operation.body] if operation.body is not None else [])]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    schemas: dict[str, Any] = _without_null_defaults(definitions["$defs"])
    return schemas


def _without_null_defaults(node: Any) -> Any:
    """A JSON schema less `"default": null`: what may be left out has no default, and generators would send it."""
    if isinstance(node, list):
        return [_without_null_defaults(one) for one in node]
    if not isinstance(node, dict):
        return node
    return {name: _without_null_defaults(one) for name, one in node.items() if (name, one) != ("default", None)}
