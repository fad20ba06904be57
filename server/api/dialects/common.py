"""What adapters share when they print."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prerope.server.api.chat.parts import Part
from prerope.server.api.chat.replies import parts_of, reader_for
from prerope.server.api.running import Running
from prerope.server.api.stream.generation import Piece
from prerope.server.api.stream.turns import in_turn
from prerope.server.engine.outputs import FinishReason
from prerope.server.errors import DeadlineExceeded


async def chat_events(running: Running) -> AsyncIterator[tuple[Piece, list[Part]]]:
    """The pieces of the one reply that runs, each with the parts that it adds. Closes the generation at its end."""
    reader = reader_for(running)
    async with in_turn(running.generations) as pieces:
        async for _, piece in pieces:
            yield piece, parts_of(piece, reader)


def check_complete(reason: FinishReason) -> None:
    """Raises DeadlineExceeded where a reply was cut: in dialects that could only call it a reply of full length."""
    if reason is FinishReason.ABORT:
        raise DeadlineExceeded(
            "The reply was cut before its end: its time (timeout_s, REQUEST_TIMEOUT_S) was over, or the server stops.",
            code="reply_cut",
        )
