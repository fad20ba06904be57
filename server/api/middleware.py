"""What happens to every HTTP request before and after its endpoint: an id, the key, the size limit, a log line.

    CORS → RequestContext (id, log, metric, last resort for errors) → KeyCheck → BodyLimit → routes

Plain ASGI, so that streams pass through unbuffered.
"""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Callable, Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_replies import error_response, internal_error
from server.errors import BodyTooLarge, RequestError, Unauthorized
from server.metrics import Metrics

log = structlog.get_logger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Routes that ask for no key: probes, scrapers, and pages that hold no data of anybody's."""
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Routes that are called every few seconds; they are logged as debug lines."""

REQUEST_ID = re.compile(r"[\w.-]{1,64}")


class RequestContext:
    """Gives each request an id (the client's x-request-id if well formed), logs it, counts it, catches what escapes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._answer(scope, receive, send_with_id, lambda: status == 0)
            finally:
                self._record(scope, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, unanswered: Callable[[], bool]) -> None:
        try:
            await self.app(scope, receive, send)
        except RequestError as error:  # from the middleware below; those of endpoints are answered there
            if not unanswered():
                raise
            await error_response(error)(scope, receive, send)
        except Exception:
            log.exception("request failed")
            if unanswered():
                await error_response(internal_error())(scope, receive, send)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        handler = _template(scope)
        self.metrics.count_http(scope["method"], handler, status)
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write("request", method=scope["method"], path=handler, status=status, seconds=round(seconds, 3))


def _template(scope: Scope) -> str:
    """The path with its parameters' names for their values. (FastAPI's route object lacks its router's prefix.)"""
    if "route" not in scope:
        return "unmatched"
    path: str = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        before, _, after = path.rpartition(str(value))
        path = f"{before}{{{name}}}{after}"
    return path


class KeyCheck:
    """Refuses requests without one of the keys; compares in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]  # all of them, always
            if scheme.lower() != "bearer" or not any(matches):
                problem = "The API key is wrong." if given else "An API key is needed."
                raise Unauthorized(f"{problem} Send the header Authorization: Bearer KEY.", code="invalid_api_key")
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies over the limit, by their declared length at once and by their true length while they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit():
            self._check(int(declared))
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                self._check(num_bytes)
            return message

        await self.app(scope, counted, send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise BodyTooLarge(
                f"The body has {num_bytes} bytes or more; at most {self.max_bytes} are accepted "
                "(MAX_BODY_BYTES raises it).",
                code="body_too_large",
            )
