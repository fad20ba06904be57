"""Work for a client as long as it is there; above all reading several generations, to their end or piece by piece.

Whoever reads closes: when a reader ends for any reason (done, refused, the client gone) nothing is left running.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Request
from prerope.server.api.stream.generation import Generation, Piece, Reply
from prerope.server.errors import ClientGone

MAX_AHEAD = 64
"""Pieces that generations may be ahead of a slow client."""

T = TypeVar("T")
_Item = tuple[int, Piece | Exception | None]
"""What a generation has for the queue; None is its end."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; ClientGone, and the work is cancelled, when the client leaves. The body must be read."""
    gone = asyncio.create_task(client_gone(request))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client closed the connection before the reply was complete")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(gone, task, return_exceptions=True)


async def client_gone(request: Request) -> None:
    """Returns once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_all(request: Request, generations: Sequence[Generation]) -> list[Reply]:
    """Every generation, to its end. Raises ClientGone, and aborts them all, when the client leaves before that."""
    gone = asyncio.create_task(client_gone(request))
    replies = [asyncio.create_task(generation.reply()) for generation in generations]
    work = asyncio.gather(*replies)
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone("the client closed the connection before the reply was complete")
        return work.result()
    finally:
        await _close([gone, work, *replies], generations)


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
        await _close(tasks, generations)


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


async def _close(tasks: Sequence[asyncio.Future[Any]], generations: Sequence[Generation]) -> None:
    """Abort first: that waits for nothing, so it is done even where this task is being cancelled."""
    for generation in generations:
        await generation.aclose()
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.gather(*tasks, return_exceptions=True)
