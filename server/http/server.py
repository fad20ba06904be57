"""uvicorn with our way of ending: a signal drains the engine while the port stays open, so that probes and new requests
get a 503 instead of a refused connection; then the process exits.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from prerope.server.engine.life import EngineState
from prerope.server.errors import ConfigurationError, OutOfMemory, of_system, words_of
from prerope.server.http.connection import Connection, Door
from prerope.server.log import LEVELS, trace
from prerope.server.service import Service

log = structlog.get_logger(__name__)

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop. Three turns later, those are closed that had to go."""

SPARE_DESCRIPTORS = 128
"""For connections that were just accepted or dropped, and for the files and pipes of the engine."""

BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""
CLOSE_GRACE_S = 5
"""Seconds that connections get to close once the engine is done: all replies are complete or aborted by then."""
EXAMPLE_BODY = """{"prompt": "The capital of France is", "max_tokens": 16}"""


class DrainingServer(uvicorn.Server):
    """One app's HTTP server. The first SIGTERM or SIGINT drains, the second exits at once.

    `failure` is why the process must exit with an error: the model could not be loaded, or the engine died.
    """

    def __init__(
        self, service: Service, app: FastAPI, url: str, *, once_ready: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """once_ready: what is done then, beside serving."""
        self.door = Door(service.settings.max_connections)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection.behind(self.door),
                backlog=ACCEPTED_AT_ONCE,
                timeout_keep_alive=service.settings.keep_alive_s,
                log_config=None,
                log_level=max(LEVELS["warning"], LEVELS[service.settings.log_level]),
                access_log=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=CLOSE_GRACE_S,
            )
        )
        self.failure: BaseException | None = None
        self._service = service
        self._url = url
        self._once_ready = once_ready
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_until_done(self, listener: socket.socket) -> None:
        """Serve until a signal has been obeyed or the engine has failed."""
        self._loop = asyncio.get_running_loop()
        self.door.room = room_for(self._service.settings.max_connections)
        _give_up_on_silence(listener, self._service.settings.client_timeout_s)
        watcher = asyncio.create_task(self._watch())
        await self.serve(sockets=[listener])
        watcher.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, and the kernel's queue as long as it was: asyncio has one number for it and for a turn's work."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """uvicorn's signal handler. Not recorded as captured: the process ends by its exit code, not by the signal."""
        if self._draining is not None or self._loop is None:
            os._exit(0)  # uvicorn's own haste would cancel the app's lifespan, which tells of that as an error
        else:
            self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        self._draining = self._draining or asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        timeout_s, notice_s = self._service.settings.shutdown_timeout_s, self._service.settings.shutdown_notice_s
        if notice_s and self._service.engine.state is EngineState.READY:
            log.info("about to shut down: /health is 503, requests are still taken", notice_s=notice_s)
            self._service.leaving = True
            await asyncio.sleep(notice_s)
        log.info("shutting down: running requests may finish, new ones get a 503", timeout_s=timeout_s)
        await self._service.engine.shutdown(timeout_s)
        self.should_exit = True

    async def _watch(self) -> None:
        """Announce the model when it is loaded; end the process when it cannot be, or when the engine dies."""
        engine = self._service.engine
        try:
            await engine.wait_until_loaded()
        except ConfigurationError as error:
            self._fail(error)
            return
        except OutOfMemory as error:
            log.error("the model could not be loaded", exc_info=error)
            self._fail(error)
            return
        except Exception as error:  # a folder holds anything, and libraries raise whatever they meet in it
            log.debug("the model could not be loaded", exc_info=error)
            self._fail(self._refusal(error))
            return
        self._announce()
        if self._once_ready is not None:
            try:
                await self._once_ready()
            except Exception as error:  # tried again by the first request that needs it; the engine is watched on
                if self._draining is None:
                    log.error("the workers could not be started", trace=trace(error))
        await engine.wait_until_stopped()
        if engine.failure is not None:
            log.error("the engine died", exc_info=engine.failure)
            self._fail(engine.failure)

    def _refusal(self, error: Exception) -> ConfigurationError:
        """What whoever started the server is told of an error that nothing on the way took for a fault of the model."""
        said = words_of(error) or "something in its files or settings is met nowhere else"
        remedy = "" if of_system(error) else "Download its files again, or take another model; "
        return ConfigurationError(
            f"MODEL_ID: {self._service.model_name!r} cannot be served: {said}. "
            f"{remedy}LOG_LEVEL=debug shows where that arose"
        )

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True

    def _announce(self) -> None:
        service, info = self._service, self._service.engine.info
        log.info(
            "ready",
            model=service.model_name,
            url=self._url,
            method=info.positions.described["method"],
            max_model_len=info.max_model_len,
            seconds=round(service.seconds_up, 1),
        )
        if service.settings.log_format == "text":
            key = " -H 'Authorization: Bearer KEY'" if service.settings.asks_for_key else ""
            print(
                f"\n  {service.model_name} is served at {self._url} (a page to try it, and /docs). From a shell:\n\n"
                f"  curl {self._url}/generate{key} -H 'Content-Type: application/json' -d '{EXAMPLE_BODY}'\n",
                flush=True,
            )


def room_for(wanted: int) -> int:
    """How many connections there may be: `wanted`, or fewer where the limit of descriptors, raised if need be, is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = Path("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd")
    needed = wanted + len(os.listdir(folder)) + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, wanted + soft - needed))
    if room < wanted:
        log.warning(f"{room} connections at once instead of MAX_CONNECTIONS={wanted}: `ulimit -n` is {soft}")
    return room


def _give_up_on_silence(listener: socket.socket, seconds: float) -> None:
    """Let the kernel drop connections (they inherit this) whose client leaves a reply unread that is complete here."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(seconds * 1000)))
