"""What happens to every HTTP request before and after its endpoint: an id, the host's name, limits, a log line.

    CORS → OtherPrefix → RequestContext (id, log, metric, last resort for errors) → HostCheck
         → KeyCheck (`keys`, where keys are asked for) → HoldRequest (`fairness`) → ClientTimeout
         → BodyLimit (`fairness`) → FieldReport → HeadAsGet → routes

Plain ASGI, so that streams pass through unbuffered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import structlog
from prerope.server.api.errors import error_response, internal_error
from prerope.server.api.keys import PROBES
from prerope.server.api.requests.body import HEADER, reporting
from prerope.server.api.requests.wording import MAX_SHOWN
from prerope.server.errors import BodyTimeout, ClientGone, RequestError, WrongHost
from prerope.server.log import trace
from prerope.server.metrics import METHODS, OTHER_METHOD, Metrics
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

QUIET_PATHS = PROBES
"""Routes that are called every few seconds; they are logged as debug lines."""

OPENAI_PREFIX = "/openai"
"""Where other services have OpenAI's paths: Groq's client asks for /openai/v1/…, whatever its base URL is."""

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""What no path of ours has in it."""

WITHOUT_V1 = re.compile(r"/(chat/completions|completions|responses|messages|models)(/|$)")
"""What a client asks for whose base URL does not end with /v1; llama.cpp's server answers there, too."""

ABORT = "abort_connection"
"""In the scope's state: a function that drops the connection with what is not yet sent (`server.http.connection`)."""

FILLER = "filler"
"""In the scope's state: bytes that mean nothing between two pieces of this reply (`server.http.connection`)."""

SSE_COMMENT = b": \n\n"

PIECE_BYTES = 64 * 2**10
"""Of a reply, sent at once: so that of one which its client does not read no more than a piece is kept."""

MIN_BODY_RATE = 16 * 2**10
"""Bytes a second that a body must come with on average, after CLIENT_TIMEOUT_S of grace."""

REQUEST_ID = re.compile(r"[\w.-]{1,64}")


class OtherPrefix:
    """Finds OpenAI's paths under `OPENAI_PREFIX` and without /v1, and none where a path has control characters.

    Keys, logs and routes see the path that it leaves.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if CONTROL.search(path):  # a route's pattern takes a line's end behind it, and a key's path is compared whole
            scope = {**scope, "path": "/%"}
        elif path.startswith(f"{OPENAI_PREFIX}/v1/"):
            scope = _moved(scope, lambda start: start[len(OPENAI_PREFIX) :])
        elif WITHOUT_V1.match(path):
            scope = _moved(scope, lambda start: "/v1" + start)
        await self.app(scope, receive, send)


def _moved(scope: Scope, to: Callable[[str], str]) -> Scope:
    """A request's scope with another path."""
    raw = (scope.get("raw_path") or b"").decode("latin-1")
    return {**scope, "path": to(scope["path"]), "raw_path": to(raw).encode("latin-1")}


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
                _complete_head(scope, message, request_id)
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
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        self.metrics.http.labels(method, handler, str(status)).inc()
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write("request", method=method, path=handler, status=status, seconds=round(seconds, 3))


def _complete_head(scope: Scope, message: Message, request_id: str) -> None:
    headers = MutableHeaders(scope=message)
    headers["x-request-id"] = request_id
    headers["x-content-type-options"] = "nosniff"
    kind = headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        scope.setdefault("state", {})[FILLER] = SSE_COMMENT
    elif kind.startswith("text/html"):  # no page elsewhere may show ours as its own
        headers["x-frame-options"] = "DENY"
        headers.setdefault("content-security-policy", "frame-ancestors 'none'")


def _template(scope: Scope) -> str:
    """The path with its parameters' names for their values. (FastAPI's route object lacks its router's prefix.)"""
    if "route" not in scope:
        return "unmatched"
    template: str = scope["route"].path_format
    end = template.format(**scope.get("path_params", {}))  # a value may have slashes, and other parts' names
    prefix = scope["path"].removesuffix(end)
    return template if prefix == scope["path"] else prefix + template


class ClientTimeout:
    """Cuts a client that lets the server wait: that sends its body too slowly, or reads no more of its reply."""

    def __init__(self, app: ASGIApp, seconds: float, in_pieces: Callable[[Message, Scope], AsyncGenerator[Message]]):
        """in_pieces: a message of more than `PIECE_BYTES` in several (`replies.Replies`)."""
        self.app = app
        self.seconds = seconds
        self._in_pieces = in_pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        now = asyncio.get_running_loop().time
        body_is_read, latest = False, now() + self.seconds

        async def receive_in_time() -> Message:
            nonlocal body_is_read, latest
            if body_is_read:  # what comes now is the client's leaving, whenever that is
                return await receive()
            silent = now() + self.seconds
            try:
                async with asyncio.timeout_at(min(silent, latest)):
                    message = await receive()
            except TimeoutError:
                raise _body_timeout(self.seconds, silent=silent <= latest) from None
            body_is_read = not message.get("more_body", False)
            latest += len(message.get("body", b"")) / MIN_BODY_RATE
            return message

        async def send_in_time(message: Message) -> None:
            try:
                if len(message.get("body", b"")) <= PIECE_BYTES:
                    async with asyncio.timeout(self.seconds):
                        return await send(message)
                async with aclosing(self._in_pieces(message, scope)) as pieces:
                    async for piece in pieces:
                        async with asyncio.timeout(self.seconds):
                            await send(piece)
            except TimeoutError:
                log.info("client dropped: it read nothing", seconds=self.seconds)
                drop(scope)
                await asyncio.sleep(0)  # the server notes the loss in its next turn, before the app returns to it
                raise ClientGone(
                    f"the client read nothing for {self.seconds:g} s (CLIENT_TIMEOUT_S)", code="client_stalled"
                ) from None

        await self.app(scope, receive_in_time, send_in_time)


def _body_timeout(seconds: float, *, silent: bool) -> BodyTimeout:
    what = f"No more of the body came for {seconds:g} s"
    if not silent:
        what = f"The body comes at less than {MIN_BODY_RATE} bytes a second, after {seconds:g} s for its beginning"
    return BodyTimeout(f"{what} (CLIENT_TIMEOUT_S); send it again.", code="body_timeout")


def drop(scope: Scope) -> None:
    """Drop the connection of a request: to close it would wait for a client that does not read."""
    scope.get("state", {}).get(ABORT, lambda: None)()


class FieldReport:
    """Names fields of a request that were left out in a header of its reply, and in the log."""

    def __init__(self, app: ASGIApp, strict: bool) -> None:
        self.app = app
        self.strict = strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        with reporting(strict=self.strict) as report:

            async def send_with_names(message: Message) -> None:
                if message["type"] == "http.response.start" and report.names:
                    MutableHeaders(scope=message)[HEADER] = ", ".join(report.names)
                    log.warning("fields were ignored", fields=report.names)
                await send(message)

            await self.app(scope, receive, send_with_names)


class HeadAsGet:
    """Answers HEAD wherever GET is answered: the same status and headers, and no body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_no_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        scope["method"] = "GET"
        try:
            await self.app(scope, receive, send_no_body)
        finally:
            scope["method"] = "HEAD"


LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")
"""Of names that are reserved for local use."""

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]]*)(:\d*)?", re.IGNORECASE)


class HostCheck:
    """Refuses requests that name another server by their Host header, against DNS rebinding.

    A page of evil.example whose name has come to resolve to 127.0.0.1 is, to a browser, of one origin with what listens
    there, and may read it. What gives it away is the Host header, evil.example. Where no key is asked for, names are
    therefore allowed that nobody can register: addresses, names of one label, and those of the local network.
    (starlette's TrustedHostMiddleware takes IPv6 addresses apart at their first colon, and knows no addresses as such.)
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str], default_all: bool) -> None:
        """allowed: names, "*.name" for those below it, "*" for all; empty: all, or those that cannot be registered."""
        self.app = app
        self.allowed = [name.lower() for name in allowed]
        self._all = "*" in self.allowed or (default_all and not self.allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._all:
            given = Headers(scope=scope).getlist("host")
            if len(given) > 1 or (given and not self._allows(given[0])):
                raise WrongHost(
                    f"The Host header names '{given[0][:MAX_SHOWN]}', which this server is not known as. Use its "
                    "address, or add the name to ALLOWED_HOSTS.",
                    code="wrong_host",
                )
        await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        match = HOST.fullmatch(host.strip())
        if match is None:
            return False
        name = match["name"].lower().rstrip(".")
        if self.allowed:
            return any(name == one or (one.startswith("*.") and name.endswith(one[1:])) for one in self.allowed)
        return "." not in name or name.endswith(LOCAL_SUFFIXES) or _is_address(name.strip("[]"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
