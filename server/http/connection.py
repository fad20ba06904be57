"""One client's connection: uvicorn's h11 protocol, with bounds on what a client may send and hold, and for how long.

    accepted ─┬─ idle ── header, HEADER_TIMEOUT_S ──┬── request ── reply ──┐
              │   └───────────────── kept alive, KEEP_ALIVE_S ─────────────┘
              └─ refused with a 503, where all others carry requests

There is room for a number of connections below the limit of file descriptors. Where it is used up, a new one takes the
place of one that waits for its client: of the one that has been idle longest, or else of the one whose body has been on
its way, or whose reply unread, for longest. So whoever opens many and leaves them there pushes out his own.

What comes is given to the parser in order, chunked bodies in slices that take turns with those of others. What a body
costs to parse grows with its chunks, not its bytes: a client may send a byte in each. Chunks are counted, and a body of
too many is refused.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import h11
import structlog
from prerope.server.api.fairness import TOO_MANY_CHUNKS, turn
from prerope.server.api.middleware import ABORT
from prerope.server.errors import HeaderTooLarge, VersionNotSupported
from prerope.server.http.half_closed import stays_open
from prerope.server.http.refusals import LINGER_S, linger, refuse, reply_to_unreadable
from prerope.server.http.targets import in_origin_form
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

log = structlog.get_logger(__name__)

SLICE_BYTES = 1024
"""What is parsed between two looks at the clock: two hundred chunks at most."""

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
            return event if event.target.startswith(b"/") else in_origin_form(event)
        if isinstance(event, h11.Data):
            self.num_chunks += event.chunk_start
            self.num_bytes += len(event.data)
        return event

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
        if self._task is None and not (sliced and len(data) > SLICE_BYTES):
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
                        data = bytes(self._left[:SLICE_BYTES])
                        del self._left[:SLICE_BYTES]
                        self._take(data)
        except Exception as error:
            log.error("connection failed", kind=type(error).__name__)
            self._abort()
        finally:
            self._task = None
            self._flow.let_go()


HEADER_TIMEOUT_S = 10.0
"""From a connection's opening, or from the first byte of a later request, to the end of that request's header."""

PIPELINE_REST_S = 0.005
"""Between a reply and the next request of a client that had sent it before: thousands, one after the other, would leave
the event loop no moment without work, and it would take a core from the engine's threads."""


class Door:
    """All connections of a server, and who may come in beside them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.lingering: set[asyncio.Protocol] = set()
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the one that is so longest first, as below
        self._halted: dict[Connection, None] = {}  # within a request, of which the client is to send or to read more

    def __len__(self) -> int:
        return len(self._open)

    def let_in(self, connection: Connection) -> bool:
        """Whether there is room, or somebody to make it who waits for his client."""
        if len(self._open) >= self.room:
            longest = next(iter(self._idle or self._halted), None)
            if longest is None:
                return False
            self.leave(longest)
            longest.transport.abort()
            log.warning("MAX_CONNECTIONS reached: the one that waited for its client longest is closed", room=self.room)
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def mark(self, connection: Connection, *, idle: bool = False, halted: bool = False) -> None:
        """What it is now: without a request, or in one that waits for its client; neither where it waits for us."""
        for waiting, is_one in ((self._idle, idle), (self._halted, halted)):
            if not is_one:
                waiting.pop(connection, None)
            elif connection in self._open:
                waiting.setdefault(connection)

    def leave(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._halted.pop(connection, None)


class Connection(H11Protocol):
    """uvicorn's, behind a door. The app may drop it: a client that does not read cannot be waited for."""

    door: Door
    """That of the server; set in the subclass that `behind` makes."""

    conn: CountingParser
    flow: HeldFlow
    _feed: Feed
    _deaf = False

    _header_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    gone_timer: asyncio.TimerHandle | None = None

    @classmethod
    def behind(cls, door: Door) -> type[Connection]:
        """The class of one server's connections: uvicorn makes instances by itself."""
        return type(cls.__name__, (cls,), {"door": door})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if not self.door.let_in(self):
            refuse(transport, self.door.room, self.door.lingering)
            return
        super().connection_made(transport)
        _send_at_once(transport)
        self.conn = CountingParser()
        self.flow = HeldFlow(transport)
        self._feed = Feed(self._take, self.flow, transport.abort)
        self.app_state = {**self.app_state, ABORT: transport.abort}
        self._note_state(expecting=True)

    def data_received(self, data: bytes) -> None:
        if not self._deaf:
            self._feed.give(data, sliced=not self._comes_whole)

    @property
    def _comes_whole(self) -> bool:
        """Whether what comes is a body whose length was told: it is parsed in one go, however long it is."""
        coming = self.conn.their_state is h11.SEND_BODY
        return coming and not any(name == b"transfer-encoding" for name, _ in self.headers)

    def _take(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        super().data_received(data)
        self._note_state(expecting=True)
        if self.conn.too_many_chunks:
            self._refuse_chunks()

    def _refuse_chunks(self) -> None:
        """Let the app tell, and hear no more of it."""
        self._deaf = True
        self._feed.close()
        self.scope["state"][TOO_MANY_CHUNKS] = True
        self.cycle.message_event.set()
        self.loop.call_later(LINGER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Answer what cannot be read as HTTP: the reason, and time to read it before the connection ends."""
        self._deaf = True
        self._feed.close()
        reply = reply_to_unreadable(self.conn.problem, self.conn.trailing_data[0], MAX_HEADER_BYTES)
        try:
            for event in reply:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # another reply has begun, and there is no more to be understood
            self.transport.abort()
        else:
            self._end_request()
            linger(self.transport, self.door.lingering, self)

    def _end_request(self) -> None:
        """To the app, the client of a request whose body cannot be read is gone: it has its reply."""
        if self.answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        log.debug("an upgrade was asked for: the request is answered as it is")

    def on_response_complete(self) -> None:
        if self.conn.trailing_data[0]:
            self._rest_timer = self.loop.call_later(PIPELINE_REST_S, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        super().on_response_complete()
        self._note_state(expecting=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self)
        self.door.lingering.discard(self)
        self._feed.close()
        for timer in (self._header_timer, self._rest_timer, self.gone_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def answering(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._tell_door()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._tell_door()

    def _tell_door(self) -> None:
        if self.answering:
            self.door.mark(self, halted=self.cycle.more_body or self.flow.write_paused)
        else:
            self.door.mark(self, idle=True)

    def _note_state(self, *, expecting: bool) -> None:
        """Whom it waits for; and where a header is expected, or begun, until when. (uvicorn's timer is for silence.)"""
        self._tell_door()
        if self.answering and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif not self.answering and expecting and self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_TIMEOUT_S, self._header_is_late)

    def _header_is_late(self) -> None:
        log.debug("connection closed: no whole request came", seconds=HEADER_TIMEOUT_S)
        self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        return stays_open(self)


def _send_at_once(transport: asyncio.Transport) -> None:
    """Without Nagle's algorithm, by which the kernel keeps a small piece until the one before it is acknowledged.

    Clients put that off for up to 40 ms, and so much longer did a connection's second request take. asyncio sees to it
    only where a socket names TCP as its protocol, which those of `socket.create_server` do not.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
