"""Room for the bodies that are being read: so many bytes of all together, however many connections there are.

    arriving ── whole ── read by a worker, in turn ── let go

Where there is none left, the body that has been arriving longest makes it, so that whoever begins many and ends none
pushes out his own; where all are whole, a new one is refused. Little ones need no room: there are not more of them than
connections.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog
from fastapi import Request
from prerope.server.api.middleware import ABORT
from prerope.server.errors import BodiesFull, ClientGone
from starlette.requests import ClientDisconnect

log = structlog.get_logger(__name__)

LITTLE_BYTES = 64 * 2**10
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
            except ClientDisconnect:
                raise ClientGone("the client closed the connection before its request was complete") from None
            self._arriving.pop(body, None)
            raw = b"".join(pieces)
            del pieces
            yield raw
        finally:
            self._arriving.pop(body, None)
            self.num_bytes -= body.num_bytes

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
