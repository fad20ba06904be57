"""The outputs of one request on their way to its reader: bounded in number, and closed by whoever leaves.

Filled and read on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any

from prerope.server.engine.outputs import TokenOutput
from prerope.server.errors import ClientGone, RequestError

MAX_UNREAD = 4096
"""Outputs that wait for a reader who is slower than the engine; past that, the request is aborted."""


class OutputStream(AsyncGenerator[TokenOutput, None]):
    """The outputs of one request. Closing it early, started or not, aborts the request within a step."""

    def __init__(self, abort: Callable[[], None]) -> None:
        self._abort = abort
        self._items: asyncio.Queue[TokenOutput | RequestError] = asyncio.Queue()
        self._ended = False

    def put(self, item: TokenOutput | RequestError) -> None:
        """Hand an item over. A reader that lets more than `MAX_UNREAD` pile up gets an error after those."""
        self._items.put_nowait(item)
        if self._items.qsize() > MAX_UNREAD and isinstance(item, TokenOutput) and item.finish_reason is None:
            self._items.put_nowait(
                ClientGone(f"{MAX_UNREAD} outputs were not read: the reader is too slow", code="reader_too_slow")
            )
            self._abort()

    async def asend(self, _value: None) -> TokenOutput:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._items.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, RequestError):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def athrow(
        self, typ: Any, val: BaseException | object = None, _tb: TracebackType | None = None
    ) -> TokenOutput:
        self._close()
        raise val if isinstance(val, BaseException) else typ

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._abort()
