"""What a client sends, on its way to the parser: chunked bodies in slices that take turns with those of others.

What a body costs to parse grows with its chunks, not its bytes: a client may send a byte in each. Chunks are counted,
and a body of too many is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import h11
import structlog
from prerope.server.workers.slices import turn
from uvicorn.protocols.http.flow_control import FlowControl

log = structlog.get_logger(__name__)

PIECE_BYTES = 1024
"""What is parsed between two looks at the clock: two hundred chunks at most."""

FREE_CHUNKS, BYTES_A_CHUNK = 4096, 256
"""A body may come in so many chunks, and in one more for each so many bytes."""


class CountingParser(h11.Connection):
    """h11's, which counts the chunks of a request's body."""

    num_chunks = num_bytes = 0

    def next_event(self) -> object:  # type: ignore[override]
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_bytes = 0
        elif isinstance(event, h11.Data):
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
