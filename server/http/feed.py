"""What a client sends, on its way to the parser: chunked bodies in slices that take turns with those of others.

What a body costs to parse grows with its chunks, not its bytes: a client may send a byte in each. Chunks are counted,
and a body of too many is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11
import structlog
from prerope.server.errors import HeaderTooLarge, InvalidRequest, RequestError, VersionNotSupported, first_line
from prerope.server.workers.slices import turn
from uvicorn.protocols.http.flow_control import FlowControl

log = structlog.get_logger(__name__)

PIECE_BYTES = 1024
"""What is parsed between two looks at the clock: two hundred chunks at most."""

TLS = b"\x16\x03"

FREE_CHUNKS, BYTES_A_CHUNK = 4096, 256
"""A body may come in so many chunks, and in one more for each so many bytes."""


MAX_HEADER_BYTES = 16 * 2**10
"""Of a request's line and headers together, and of a chunk's own line."""


VERSIONS = (b"1.1", b"1.0")


class CountingParser(h11.Connection):
    """h11's, which bounds headers however they come, counts the chunks of a body, and remembers what it refuses."""

    num_chunks = num_bytes = 0
    problem: h11.RemoteProtocolError | None = None

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADER_BYTES)

    def next_event(self) -> object:  # type: ignore[override]
        try:
            return self._counted(super().next_event())
        except h11.RemoteProtocolError as problem:
            self.problem = problem
            raise

    def _counted(self, event: object) -> object:
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_bytes = 0
            if event.http_version not in VERSIONS:
                raise h11.RemoteProtocolError("unknown version", error_status_hint=VersionNotSupported.status)
            if len(event.target) + sum(len(name) + len(value) for name, value in event.headers) > MAX_HEADER_BYTES:
                raise h11.RemoteProtocolError("long header", error_status_hint=HeaderTooLarge.status)
        elif isinstance(event, h11.Data):
            self.num_chunks += event.chunk_start
            self.num_bytes += len(event.data)
        return event

    @property
    def refusal(self) -> RequestError:
        """What is wrong with what came."""
        if self.problem is not None and self.problem.error_status_hint == HeaderTooLarge.status:
            return HeaderTooLarge(
                f"The request line and headers have more than {MAX_HEADER_BYTES} bytes: send fewer or shorter "
                "ones, and what is long in the body.",
                code="header_too_large",
            )
        if self.problem is not None and self.problem.error_status_hint == VersionNotSupported.status:
            return VersionNotSupported("HTTP/1.1 and HTTP/1.0 are spoken here: send one of these.", code="bad_http")
        said = f"This is no HTTP/1.1 request that can be read: {first_line(self.problem or ValueError())}."
        if self.trailing_data[0].startswith(TLS):
            said += " It begins as TLS: use http://, or put a proxy in front that ends TLS."
        return InvalidRequest(said, code="bad_http")

    @property
    def too_many_chunks(self) -> bool:
        return self.num_chunks > FREE_CHUNKS + self.num_bytes // BYTES_A_CHUNK


class HeldFlow(FlowControl):
    """uvicorn's, beside which reading may be held for a reason of ours."""

    _held = False

    def hold(self) -> None:
        self._held = True
        self._transport.pause_reading()

    def let_go(self) -> None:
        self._held = False
        if not self.read_paused:
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        self.read_paused = False
        if not self._held:
            self._transport.resume_reading()


class Feed:
    """Gives `take` one connection's data in order: at once, or later and in slices."""

    def __init__(self, take: Callable[[bytes], None], flow: HeldFlow, abort: Callable[[], None]) -> None:
        """abort: ends the connection, where `take` raises."""
        self._take = take
        self._flow = flow
        self._abort = abort
        self._left = bytearray()
        self._task: asyncio.Task[None] | None = None

    def give(self, data: bytes, *, sliced: bool) -> None:
        """sliced: what is in it may take long."""
        if self._task is None and not (sliced and len(data) > PIECE_BYTES):
            self._take(data)
            return
        self._left += data
        if self._task is None:
            self._flow.hold()
            self._task = asyncio.get_running_loop().create_task(self._slices())

    def close(self) -> None:
        self._left.clear()

    async def _slices(self) -> None:
        try:
            while self._left:
                async with turn() as in_time:
                    while self._left and in_time():
                        piece = bytes(self._left[:PIECE_BYTES])
                        del self._left[:PIECE_BYTES]
                        self._take(piece)
        except Exception as error:
            log.error("connection failed", kind=type(error).__name__)
            self._abort()
        finally:
            self._task = None
            self._flow.let_go()
