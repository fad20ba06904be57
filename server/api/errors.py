"""Errors as replies: `{"error": {"message", "type", "param", "code"}}` with the status of `server.errors`.

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
from prerope.server.api.requests.complaints import SHOWN_CHARS, first_invalid
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

log = structlog.get_logger(__name__)

RETRY_LOADING_S = 5


def error_body(error: RequestError) -> dict[str, Any]:
    """The JSON that says what went wrong."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


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
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


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
    known = instead_of(request.url.path) if error.status_code == 404 else None
    messages = {
        404: known or "There is no such route; /docs lists them.",
        405: f"This route does not take {known_method(request.method)}; /docs lists the methods.",
    }
    message = messages.get(error.status_code, str(error.detail))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": "not_served" if known else None}
    return JSONResponse({"error": body}, status_code=error.status_code, headers=_plain(error.headers))


def _is_encoded(request: Request) -> bool:
    """Whether the body is said to be compressed."""
    return request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity")


def _encoded(request: Request) -> RequestError:
    given = request.headers["content-encoding"][:SHOWN_CHARS]
    return UnsupportedEncoding(f"The body is compressed (Content-Encoding: {given}); send it as it is.")


def _plain(headers: Mapping[str, str] | None) -> dict[str, str]:
    return dict(headers or {})
