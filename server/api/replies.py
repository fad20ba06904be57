"""Large replies on their way to clients: sent in pieces, and with so many bytes of room together.

A reply may be ten times as large as what asked for it, and is kept until its client has read it. Where all that are on
their way have no more room, the one that has been so longest is dropped: so whoever asks for many and reads none, or
little, drops his own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import structlog
from prerope.server.api.middleware import PIECE_BYTES, drop
from prerope.server.errors import ClientGone
from starlette.types import Message, Scope

log = structlog.get_logger(__name__)

MAX_REPLY_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class _Reply:
    scope: Scope
    num_bytes: int


class Replies:
    """Sends large messages of replies in pieces, and counts them while they are on their way."""

    def __init__(self, rest: Callable[[int], Awaitable[None]], max_bytes: int = MAX_REPLY_BYTES) -> None:
        """rest: called between two pieces, with the bytes of one, for others to have their turn."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rest = rest
        self._under_way: dict[_Reply, None] = {}

    async def in_pieces(self, message: Message, scope: Scope) -> AsyncGenerator[Message]:
        """A part of a reply, in as many as it takes for the server to see between two whether they are read."""
        body = message["body"]
        reply = _Reply(scope, len(body))
        self._make_room(reply)
        try:
            for start in range(0, len(body), PIECE_BYTES):
                if start:  # the server notes a client that is gone, too
                    await self._rest(PIECE_BYTES)
                if reply not in self._under_way:
                    raise ClientGone("the reply made room for others: it was on its way longest", code="reply_dropped")
                stop = start + PIECE_BYTES
                more = stop < len(body) or message.get("more_body", False)
                yield {**message, "body": body[start:stop], "more_body": more}
        finally:
            self._let_go(reply)

    def _make_room(self, reply: _Reply) -> None:
        self._under_way[reply] = None
        self.num_bytes += reply.num_bytes
        while self.num_bytes > self.max_bytes and len(self._under_way) > 1:
            longest = next(iter(self._under_way))
            log.warning("a reply made room for others: it was on its way longest", max_bytes=self.max_bytes)
            self._let_go(longest)
            drop(longest.scope)

    def _let_go(self, reply: _Reply) -> None:
        if reply in self._under_way:
            del self._under_way[reply]
            self.num_bytes -= reply.num_bytes
