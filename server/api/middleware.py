"""What happens to every HTTP request before and after its endpoint: an id, the key, limits, a log line.

    CORS → RequestContext (id, log, metric, last resort for errors) → KeyCheck → HoldLease (`lease`) → ClientTimeout
         → BodyLimit → routes

Plain ASGI, so that streams pass through unbuffered.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable

import structlog
from prerope.server.api.auth.keys import KeyRing
from prerope.server.api.errors import error_response, internal_error, known_method
from prerope.server.errors import BodyTimeout, BodyTooLarge, ClientGone, RequestError, Unauthorized
from prerope.server.log import trace
from prerope.server.metrics import Metrics
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/metrics", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Routes that ask for no key: probes, scrapers, and pages that hold no data of anybody's."""
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Routes that are called every few seconds; they are logged as debug lines."""

ABORT = "abort_connection"
"""In the scope's state: a function that drops the connection with what is not yet sent (`server.http`)."""

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
            if unanswered():
                await error_response(error)(scope, receive, send)
        except Exception as error:
            log.error("request failed", trace=trace(error))
            if unanswered():
                await error_response(internal_error())(scope, receive, send)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        handler = _template(scope)
        method = known_method(scope["method"])
        self.metrics.count_http(method, handler, status)
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write("request", method=method, path=handler, status=status, seconds=round(seconds, 3))


def _template(scope: Scope) -> str:
    """The path with its parameters' names for their values. (FastAPI's route object lacks its router's prefix.)"""
    if "route" not in scope:
        return "unmatched"
    path: str = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        if str(value):
            before, _, after = path.rpartition(str(value))
            path = f"{before}{{{name}}}{after}"
    return path


class KeyCheck:
    """Refuses requests without one of the keys; notes in the scope whose key it is, as `tenant`."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys.asks and scope["path"] not in OPEN_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            tenant = self.keys.tenant(given.strip().encode("latin-1"))  # the bytes as they came
            if scheme.lower() != "bearer" or tenant is None:
                problem = "The API key is wrong." if given else "An API key is needed."
                raise Unauthorized(f"{problem} Send the header Authorization: Bearer KEY.", code="invalid_api_key")
            scope["tenant"] = tenant
        await self.app(scope, receive, send)


class ClientTimeout:
    """Cuts a client that lets the server wait: that sends no more of its body, or reads no more of its reply."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self.app = app
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body_is_read = False

        async def receive_in_time() -> Message:
            nonlocal body_is_read
            if body_is_read:  # what comes now is the client's leaving, whenever that is
                return await receive()
            try:
                async with asyncio.timeout(self.seconds):
                    message = await receive()
            except TimeoutError:
                raise BodyTimeout(
                    f"No more of the body came for {self.seconds:g} s (CLIENT_TIMEOUT_S); send it again.",
                    code="body_timeout",
                ) from None
            body_is_read = not message.get("more_body", False)
            return message

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self.seconds):
                    await send(message)
            except TimeoutError:
                log.info("client dropped: it read nothing", seconds=self.seconds)
                await _abort(scope)
                raise ClientGone(
                    f"the client read nothing for {self.seconds:g} s (CLIENT_TIMEOUT_S)", code="client_stalled"
                ) from None

        await self.app(scope, receive_in_time, send_in_time)


async def _abort(scope: Scope) -> None:
    """Drop the connection: to close it would wait for a client that does not read."""
    abort = scope.get("state", {}).get(ABORT)
    if abort is not None:
        abort()
        await asyncio.sleep(0)  # the server notes the loss in its next turn, before the app returns to it


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
