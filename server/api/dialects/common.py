"""What adapters share when they print."""

from __future__ import annotations

from collections.abc import AsyncIterator

from prerope.server.api.chat.parts import Part
from prerope.server.api.running import Running, parts_of
from prerope.server.api.stream.collect import in_turn
from prerope.server.api.stream.generation import Piece


async def chat_events(running: Running) -> AsyncIterator[tuple[Piece, list[Part]]]:
    """The pieces of the one reply that runs, each with the parts that it adds. Closes the generation at its end."""
    reader = running.reader()
    async with in_turn(running.generations) as pieces:
        async for _, piece in pieces:
            yield piece, parts_of(piece, reader)
