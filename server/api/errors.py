"""Errors as replies: `{"error": {"message", "type", "param", "code"}}` with the status of `server.errors`.

Clients of /v1/messages read a `"type": "error"` beside it, those of /api/… an `error` that is the message alone.

What is not ours (a body that is no JSON, an unknown route, a bug) is put into the same shape. A reply never shows a
traceback, a path, or text from a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prerope.server.api.requests.body import COMPRESSED, JSON, kind_of_body
from prerope.server.api.requests.wording import SHOWN_CHARS, first_invalid
from prerope.server.errors import (
    BodiesFull,
    BodyTimeout,
    EngineFailure,
    EngineUnavailable,
    InvalidRequest,
    QueueFull,
    RequestError,
    Unauthorized,
    UnsupportedEncoding,
)
from prerope.server.metrics import METHODS, OTHER_METHOD
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

log = structlog.get_logger(__name__)

RETRY_LOADING_S = 5

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What Anthropic's clients call an error, by its status."""


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON that says what went wrong."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


class _ErrorReply(JSONResponse):
    """An error in the shape that clients of the request's path read."""

    def __init__(self, body: dict[str, Any], status: int, headers: Mapping[str, str]) -> None:
        super().__init__(body, status, headers)
        self._told, self._extra = body, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._told["error"]
        if scope["path"].startswith("/v1/messages"):
            kind = ANTHROPIC_TYPES.get(self.status_code, error["type"])
            shown = {"type": "error", "error": {**error, "type": kind}}
            await JSONResponse(shown, self.status_code, self._extra)(scope, receive, send)
        elif scope["path"].startswith("/api/"):
            await JSONResponse({"error": error["message"]}, self.status_code, self._extra)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def error_response(error: RequestError) -> JSONResponse:
    headers: dict[str, str] = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after_s)
    elif isinstance(error, EngineUnavailable | BodiesFull):
        headers["Retry-After"] = str(RETRY_LOADING_S)
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, BodyTimeout):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return _ErrorReply(error_body(error), error.status, headers)


def internal_error() -> RequestError:
    """The error that a client gets for a bug."""
    return EngineFailure("Internal server error.", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of the app's routes take this shape."""
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)


async def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    kind = kind_of_body(request.headers)
    if kind == COMPRESSED:
        return error_response(_encoded(request))
    if kind != JSON and tuple(error.errors()[0]["loc"]) == ("body",):
        given = f"not {kind[:SHOWN_CHARS]}" if kind else "which is missing"
        return error_response(
            InvalidRequest(f"The body must be JSON, sent with Content-Type: application/json, {given}.")
        )
    return error_response(first_invalid(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = instead_of(request.url.path) if error.status_code in (404, 405) else None
    method = request.method if request.method in METHODS else OTHER_METHOD
    messages = {
        404: "There is no such route; /docs lists them.",
        405: f"This route does not take {method}; /docs lists the methods.",
    }
    message = known or messages.get(error.status_code, str(error.detail))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_served" if known else None}
    return _ErrorReply({"error": body}, 404 if known else error.status_code, error.headers or {})


def _encoded(request: Request) -> RequestError:
    given = request.headers["content-encoding"][:SHOWN_CHARS]
    return UnsupportedEncoding(f"The body is compressed (Content-Encoding: {given}); send it as it is.")


_TEXT = "this server writes text (/v1/chat/completions, /v1/completions)"
_INSTEAD = {
    "embeddings": f"embeddings: {_TEXT}; serve an embedding model beside it, e.g. with text-embeddings-inference",
    "rankings": f"scores of documents: {_TEXT}; serve a reranker beside it, e.g. with text-embeddings-inference",
    "images": f"images: {_TEXT}",
    "videos": f"videos: {_TEXT}",
    "audio": f"speech: {_TEXT}; transcribe beside it, e.g. with whisper.cpp, and send the text",
    "moderations": "moderation: no moderation model runs here; ask for a judgement in a chat, with a 'choice'",
    "files": "files and batches: send requests at once, as many as you like; they run together",
    "assistants": "assistants, threads and vector stores: conversations are their client's, or go on by the "
    "'previous_response_id' of /v1/responses; documents stand in the request",
    "tuning": "training: serve the tuned checkpoint, as MODEL_ID",
    "realtime": "speech in real time: stream text from /v1/responses or /v1/chat/completions",
    "infill": "text in between: models served here complete at the end only (/v1/completions)",
    "completion": "completions at this path: they are at /v1/completions, with llama.cpp's names for its fields",
    "compaction": "summaries in place of a conversation: it goes on whole, by 'previous_response_id' or its items",
    "models": "models by their clients' wish: one is served, which is chosen at the start (MODEL_ID)",
}
_PATHS = {
    "embeddings": ("/v1/embeddings", "/embeddings", "/embedding", "/embed", "/pooling", "/v2/embed"),
    "rankings": ("/v1/rerank", "/v2/rerank", "/rerank", "/reranking", "/v1/score", "/score", "/classify"),
    "images": ("/v1/images",),
    "videos": ("/v1/videos",),
    "audio": ("/v1/audio",),
    "moderations": ("/v1/moderations",),
    "files": ("/v1/files", "/v1/batches", "/v1/uploads", "/v1/messages/batches"),
    "assistants": ("/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/conversations", "/v1/containers"),
    "tuning": ("/v1/fine_tuning", "/v1/fine-tunes", "/v1/evals"),
    "realtime": ("/v1/realtime",),
    "infill": ("/infill", "/v1/fim"),
    "completion": ("/completion",),
    "compaction": ("/v1/responses/compact",),
    "models": ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/v1/load_lora_adapter"),
}
_KINDS = {path: kind for kind, paths in _PATHS.items() for path in paths}
_MOST_PARTS = max(path.count("/") for path in _KINDS)


def instead_of(path: str) -> str | None:
    """The message for a path that has no route, where it is one of others."""
    parts = path.split("/", _MOST_PARTS + 1)[: _MOST_PARTS + 1]
    starts = ("/".join(parts[:length]) for length in range(len(parts), 1, -1))
    kind = next((_KINDS[start] for start in starts if start in _KINDS), None)
    return None if kind is None else f"Not served here: {_INSTEAD[kind]}."
