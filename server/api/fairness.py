"""What requests share, and how nobody takes it all: the sequences of a key, room for bodies, turns on the event loop.

    KeyCheck ─ tenant ─ HoldRequest ─┬─ BodyRoom: arriving ── whole ── read in a turn or by a worker ── let go
                                     ├─ admit: count(n sequences), close_at_end(generations)
                                     └─ the reply has ended, or the client is gone: everything is given back

A *hold* is what one request has until its reply has ended. Whatever way it ends, also before its stream is first read,
nothing that it started outlives it.

A body has a largest size (`BodyLimit`). All that are being read have so many bytes of room together, however many
connections there are. Where there is none left, the body that has been arriving longest makes it, so that whoever
begins many and ends none pushes out his own; where all are whole, a new one is refused. Little ones need no room: there
are not more of them than connections.

Work of a client's size that stays on the event loop is done in *slices*, one a turn, whoever it is for:

    async with turn() as left:
        while items and left():
            …

The loop calls everything that is ready before it looks for anything new. Had each of a thousand connections its slice
in the same turn, a stream's next token would wait for a thousand of them. So slices take turns, first come first
served, and after each the loop and the engine's thread, which needs the interpreter's lock too, have as much time to
themselves.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import structlog
from fastapi import Request
from prerope.server.api.middleware import ABORT
from prerope.server.errors import BodiesFull, BodyTooLarge, ClientGone, InvalidRequest, KeyBusy
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)


class Closable(Protocol):
    """A generation, as far as a hold needs it."""

    async def aclose(self) -> None: ...


class Allowance:
    """How many sequences each tenant has at once, and may have."""

    def __init__(self, limit: int | None, retry_after_s: Callable[[], int]) -> None:
        """limit: None is any number. retry_after_s: what a refused client is told to wait."""
        self.limit = limit
        self.in_use: Counter[str] = Counter()
        self._retry_after_s = retry_after_s

    def take(self, tenant: str, count: int, held: int) -> None:
        """Take `count` more sequences beside `held`. Raises InvalidRequest where no waiting helps, or KeyBusy."""
        others = self.in_use[tenant] - held
        if self.limit is not None and held + count > self.limit:
            raise InvalidRequest(
                f"the request asks for {held + count} sequences (prompts times choices); with one API key at most "
                f"{self.limit} are allowed at once (MAX_SEQS_PER_KEY): send smaller requests",
                param="n",
                code="too_many_sequences",
            )
        if self.limit is not None and others + held + count > self.limit:
            seconds = self._retry_after_s()
            raise KeyBusy(
                f"{others} sequences run or wait with this API key and {held + count} more would pass "
                f"MAX_SEQS_PER_KEY, {self.limit}; try again when one has ended, or in about {seconds} s",
                retry_after_s=seconds,
            )
        self.in_use[tenant] += count

    def give_back(self, tenant: str, count: int) -> None:
        self.in_use[tenant] -= count
        if not self.in_use[tenant]:
            del self.in_use[tenant]


class Hold:
    """One request's. Without an allowance nothing is counted.

    Attributes:
        tenant: whose key the request carries; empty where no key is asked for.
        line: among whom the request waits for a worker: its tenant's, or those of its client's address.
    """

    def __init__(self, tenant: str = "", allowance: Allowance | None = None, address: str = "") -> None:
        self.tenant = tenant
        self.line = tenant or address
        self._allowance = allowance if tenant else None
        self._held = 0
        self._closing: list[Closable] = []

    def count(self, num_sequences: int) -> None:
        """Count as this many sequences from now on. Raises InvalidRequest or KeyBusy, with nothing changed."""
        if self._allowance is not None and num_sequences > self._held:
            self._allowance.take(self.tenant, num_sequences - self._held, self._held)
            self._held = num_sequences

    def close_at_end(self, closables: Sequence[Closable]) -> None:
        self._closing.extend(closables)

    async def end(self) -> None:
        """Give everything back. Generations close without waiting, so a cancelled task does this too."""
        for closable in self._closing:
            await closable.aclose()
        if self._allowance is not None and self._held:
            self._allowance.give_back(self.tenant, self._held)
            self._held = 0


_current: ContextVar[Hold | None] = ContextVar("hold", default=None)


def current_hold() -> Hold:
    """The hold of the request that is being answered; an empty hold outside of any request."""
    return _current.get() or Hold()


class HoldRequest:
    """Opens a hold for each request and ends it with the reply. A POST is one sequence until it asks for more."""

    def __init__(self, app: ASGIApp, allowance: Allowance) -> None:
        self.app = app
        self.allowance = allowance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        hold = Hold(scope.get("tenant", ""), self.allowance, (scope.get("client") or ("",))[0])
        if scope["method"] == "POST":
            hold.count(1)
        token = _current.set(hold)
        try:
            await self.app(scope, receive, send)
        finally:
            _current.reset(token)
            await hold.end()


TOO_MANY_CHUNKS = "too_many_chunks"
"""In the scope's state, once the body has come in more chunks than are taken (`server.http.connection`)."""


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
        if declared.isdecimal():
            self._check(int(declared))
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if scope.get("state", {}).get(TOO_MANY_CHUNKS):
                raise InvalidRequest(
                    f"The body comes in too many chunks for its size ({num_bytes} bytes so far): send larger ones, or "
                    "the body whole, with Content-Length.",
                    code="too_many_chunks",
                )
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


LITTLE_BYTES = 64 * 2**10
BYTES_A_SECOND = 256 * 2**20
"""Of all larger bodies and replies together: so many are some 0.4 s of work for the event loop."""
BODIES = 16
"""How many bodies of the largest allowed size there is room for."""


@dataclass(slots=True, eq=False)
class _Body:
    abort: Callable[[], None]
    num_bytes: int = 0


class BodyRoom:
    """Counts, and makes room. All methods are called on the event loop."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._arriving: dict[_Body, None] = {}
        self._resting = asyncio.Lock()

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, whole; within the context it counts."""
        body = _Body(request.scope.get("state", {}).get(ABORT, lambda: None))
        self._arriving[body] = None
        try:
            pieces = []
            try:
                async for piece in request.stream():
                    pieces.append(piece)
                    self._grow(body, len(piece))
                    if body.num_bytes > LITTLE_BYTES:
                        await self.rest(len(piece))
            except ClientDisconnect:
                raise ClientGone("the client closed the connection before its request was complete") from None
            self._arriving.pop(body, None)
            raw = b"".join(pieces)
            del pieces
            yield raw
        finally:
            self._arriving.pop(body, None)
            self.num_bytes -= body.num_bytes

    async def rest(self, num_bytes: int) -> None:
        """Let the event loop, which has a core while bytes come or go, leave it to the engine for as long: one at a
        time, whosever they are."""
        async with self._resting:
            await asyncio.sleep(num_bytes / BYTES_A_SECOND)

    def _grow(self, body: _Body, num_bytes: int) -> None:
        body.num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes and body.num_bytes > LITTLE_BYTES:
            longest = next((one for one in self._arriving if one.num_bytes > LITTLE_BYTES), body)
            if longest is body:
                raise BodiesFull(
                    f"The bodies that are being read take {self.max_bytes} bytes together, which is all that there is "
                    f"room for ({BODIES} times MAX_BODY_BYTES); try again in a few seconds.",
                    code="bodies_full",
                )
            log.warning("a body made room for others: it was arriving longest", max_bytes=self.max_bytes)
            self._arriving.pop(longest)
            self.num_bytes -= longest.num_bytes
            longest.num_bytes = 0
            longest.abort()


SLICE_S = 0.001
MAX_REST_S = 0.005

LONGEST_S = 0.25
"""Of what runs on the loop at once, whatever it is: then it is cut off."""

T = TypeVar("T")


class TooLong(BaseException):
    """It was cut off. No Exception: what is cut off may catch those, and go on."""


_locks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


@asynccontextmanager
async def turn() -> AsyncIterator[Callable[[], bool]]:
    """One slice: yields a function that tells whether time is left. Waits only behind slices of others."""
    loop = asyncio.get_running_loop()
    lock = _locks.setdefault(loop, asyncio.Lock())
    await lock.acquire()
    began = time.perf_counter()
    try:
        yield lambda: time.perf_counter() - began < SLICE_S
    finally:
        loop.call_later(min(time.perf_counter() - began, MAX_REST_S), lock.release)


def cut_off(function: Callable[[], T], seconds: float = LONGEST_S) -> T:
    """What it returns; TooLong after so many seconds of this thread's CPU time, wherever in Python's code it is then.

    Only the main thread can be interrupted so: on another it takes as long as it takes.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()

    began, over = time.thread_time(), False

    def stop(*_signal: object) -> None:
        if over:  # the timer ran out after the function had returned: armed again it would end the process
            return
        if time.thread_time() - began >= seconds:
            raise TooLong
        signal.setitimer(signal.ITIMER_REAL, seconds)  # others had the core, or the machine slept

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return function()
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
