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
from prerope.server.api.requests.body import SHOWN_CHARS, first_invalid
from prerope.server.api.unserved import instead_of
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
from prerope.server.metrics import known_method
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
    if _is_encoded(request):
        return error_response(_encoded(request))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and "json" not in kind and "body" in error.errors()[0]["loc"][:1]:
        return error_response(
            InvalidRequest(
                f"The body must be JSON, sent with Content-Type: application/json, not {kind[:SHOWN_CHARS]}."
            )
        )
    return error_response(first_invalid(error.errors()))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    known = instead_of(request.url.path) if error.status_code in (404, 405) else None
    messages = {
        404: "There is no such route; /docs lists them.",
        405: f"This route does not take {known_method(request.method)}; /docs lists the methods.",
    }
    message = known or messages.get(error.status_code, str(error.detail))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_served" if known else None}
    return _ErrorReply({"error": body}, 404 if known else error.status_code, error.headers or {})


def _is_encoded(request: Request) -> bool:
    """Whether the body is said to be compressed."""
    return request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity")


def _encoded(request: Request) -> RequestError:
    given = request.headers["content-encoding"][:SHOWN_CHARS]
    return UnsupportedEncoding(f"The body is compressed (Content-Encoding: {given}); send it as it is.")
