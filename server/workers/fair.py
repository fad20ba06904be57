"""A semaphore that is fair to lines (tenants): they get places in turn, and none gets all of them."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSemaphore:
    """A fair semaphore: `at_once` holders in all, and of one line all but one, so that any other line finds a place."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._most = max(1, at_once - 1)
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @asynccontextmanager
    async def place(self, line: str) -> AsyncIterator[None]:
        """A context that holds one of the places."""
        if self._free and self._held[line] < self._most:
            self._take(line)
        else:
            await self._wait(line)
        try:
            yield
        finally:
            self._give_back(line)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def _wait(self, line: str) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(line, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # the place came as we left
                self._give_back(line)
            raise

    def _take(self, line: str) -> None:
        self._free -= 1
        self._held[line] += 1

    def _give_back(self, line: str) -> None:
        self._free += 1
        self._held[line] -= 1
        while self._free:
            able = (one for one in self._waiting if self._held[one] < self._most)
            following = next(able, None)
            if following is None:
                break
            self._let_in(following)
        self._held = +self._held  # without those that hold none

    def _let_in(self, line: str) -> None:
        queue = self._waiting[line]
        while queue and (mine := queue.popleft()).done():
            pass  # who has left
        if queue:
            self._waiting.move_to_end(line)
        else:
            del self._waiting[line]
        if not mine.done():
            self._take(line)
            mine.set_result(None)
