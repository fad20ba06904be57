"""One replica: the application and its engine as they are served alone, but for the socket, which is Serve's.

It is there once its model is loaded. Ray asks whether it is well, how much waits before it and what it measures. When
it is to go it gets no more requests, those that run finish within SHUTDOWN_TIMEOUT_S, and then the engine ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from prerope.server.log import configure_logging
from prerope.server.machine.threads import let_waiting_threads_sleep, limit_threads
from prerope.server.ray_app.call import Call
from prerope.server.ray_app.metrics import Families
from prerope.server.ray_app.scaling import BUSY, QUEUED_TOKENS
from prerope.server.settings import Settings
from ray import serve

if TYPE_CHECKING:
    from prerope.server.service import Service
    from starlette.types import Message


class Replica:
    """The deployment of the engine."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns once it takes requests. Ray has set OMP_NUM_THREADS to the cores of this replica."""
        configure_logging(settings.log_level, settings.log_format)
        let_waiting_threads_sleep()
        limit_threads(1)
        from prerope.server.app import create_app

        self._app = create_app(settings)
        self._service: Service = self._app.state.service
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._unfinished: set[asyncio.Task[None]] = set()
        await self._lifespan.__aenter__()
        await self._service.engine.wait_until_loaded()
        await self._service.start_workers()
        self._service.reads_inline = False  # nothing on this thread, which is not the first, can be cut off

    async def answer(self, call: Call) -> AsyncIterator[list[Message]]:
        """The application's messages, as many at once as have come: a client that leaves ends the generator."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        given, gone = False, asyncio.Event()

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        answering = asyncio.create_task(self._app(call.scope, receive, sent.put))
        self._unfinished.add(answering)
        answering.add_done_callback(self._unfinished.discard)
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                messages = [message]
                while not sent.empty() and (message := sent.get_nowait()) is not None:
                    messages.append(message)
                yield messages
                if message is None:
                    break
            await answering
        finally:
            gone.set()

    async def check_health(self) -> None:
        """Raises where the engine takes no requests: Ray then starts another replica in this one's place."""
        self._service.engine.require_ready()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling.QueuedTokens`."""
        engine = self._service.engine
        stats = engine.stats()
        return {
            QUEUED_TOKENS: stats.num_waiting_tokens + stats.num_running_tokens,
            BUSY: stats.num_running / engine.engine.config.max_num_seqs,
        }

    async def metrics(self) -> tuple[str, Families]:
        """This replica's name, and what it measures."""
        return serve.get_replica_context().replica_tag, list(self._service.metrics.registry.collect())

    async def __del__(self) -> None:
        """Serve awaits it once nothing runs any more, or SHUTDOWN_TIMEOUT_S is over."""
        if hasattr(self, "_lifespan"):
            await self._lifespan.__aexit__(None, None, None)
