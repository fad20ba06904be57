"""The life of an engine's thread: loading, ready, draining, and dead or left to a step that does not end."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prerope.server.engine.engine import Engine
from prerope.server.errors import EngineUnavailable, RequestError, engine_failure

STEP_GRACE_S = 2.0
"""Seconds past the drain's deadline that a running step gets to end; then the thread is given up."""


class EngineState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what runs until `deadline` (monotonic seconds), then abort the rest and end the thread."""

    deadline: float


def shut_down() -> EngineUnavailable:
    return EngineUnavailable("the server shut down before the reply was complete; send it again", code="draining")


class EngineLife:
    """An `AsyncEngine`, as far as no request comes into it.

    Attributes:
        failure: why the engine is DEAD.
        stage: what loading does now, for people.
    """

    _thread: threading.Thread

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._streams: dict[str, Any] = {}  # of open requests; what fails is put into them
        self._unseen: dict[str, int] = {}  # submitted, not yet in the statistics: request id → prompt tokens
        self._loaded = asyncio.Event()
        self._stopped = asyncio.Event()
        self._left = False  # the thread hangs in a step; nobody waits for it
        self._state = EngineState.LOADING
        self.failure: BaseException | None = None
        self.stage = "starting"

    def start(self) -> None:
        """Begin loading; within a running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def wait_until_loaded(self) -> None:
        """Wait until the engine is READY; raises the reason where it will never be."""
        await self._loaded.wait()
        if self.failure is not None:
            raise self.failure

    async def wait_until_stopped(self) -> None:
        """Wait until the thread has ended: drained, or dead."""
        await self._stopped.wait()

    async def shutdown(self, timeout_s: float) -> None:
        """Refuse new work, finish what runs, abort what is left after `timeout_s`, and end the thread.

        A step that is not over `STEP_GRACE_S` later is not waited for: what is open fails, and the thread is left.
        """
        if self._state in (EngineState.READY, EngineState.LOADING):
            self._state = EngineState.DRAINING
        self._inbox.put(Drain(time.monotonic() + timeout_s))
        if not self._thread.is_alive() or self._engine is None:
            return
        try:
            async with asyncio.timeout(timeout_s + STEP_GRACE_S):
                await self._stopped.wait()
        except TimeoutError:
            self._fail_streams(shut_down())
            self._stopped.set()
            self._left = True
        if not self._left:
            await asyncio.to_thread(self._thread.join)

    def lose(self, failure: BaseException) -> None:
        """What a step needs is gone, so it may never end. Called on any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_up, failure)

    def _give_up(self, failure: BaseException) -> None:
        self._left = True
        self._die(failure)

    def _die(self, failure: BaseException) -> None:
        if self._state is EngineState.DEAD or self._stopped.is_set():
            return
        self._state = EngineState.DEAD
        self.failure = failure
        self._fail_streams(engine_failure(failure))
        self._loaded.set()
        self._stopped.set()

    def _fail_streams(self, error: RequestError) -> None:
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        self._unseen.clear()
