"""The pieces of one or several generations as one stream, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prerope.server.api.stream.generation import Generation, Piece, close_all

MAX_AHEAD = 64
"""Pieces that generations may be ahead of a slow client."""

_Item = tuple[int, Piece | Exception | None]
"""What a generation has for the queue; None is its end."""


@asynccontextmanager
async def in_turn(generations: Sequence[Generation]) -> AsyncIterator[AsyncIterator[tuple[int, Piece]]]:
    """(index, piece) of all generations, as they come. At exit all are closed, read to their end or not."""
    if len(generations) == 1:  # the common case needs no task and no queue
        tasks: list[asyncio.Task[None]] = []
        pieces = _numbered(generations[0])
    else:
        queue: asyncio.Queue[_Item] = asyncio.Queue(MAX_AHEAD)
        tasks = [asyncio.create_task(_pump(i, generation, queue)) for i, generation in enumerate(generations)]
        pieces = _from_queue(queue, len(tasks))
    try:
        yield pieces
    finally:
        await close_all(tasks, generations)


async def _numbered(generation: Generation) -> AsyncIterator[tuple[int, Piece]]:
    async for piece in generation:
        yield 0, piece


async def _from_queue(queue: asyncio.Queue[_Item], num_running: int) -> AsyncIterator[tuple[int, Piece]]:
    while num_running:
        index, item = await queue.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            num_running -= 1
        else:
            yield index, item


async def _pump(index: int, generation: Generation, queue: asyncio.Queue[_Item]) -> None:
    try:
        async for piece in generation:
            await queue.put((index, piece))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))
