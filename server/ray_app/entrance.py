"""What Serve's proxy sends requests to: it reads each body, has Ray's router choose a replica, and passes on the reply.

It refuses bodies that are too large, come too slowly or are too many together, as the application would. A client that
leaves ends its request on the replica. Where a replica dies, those that it had begun to answer are cut, and the others
get a 503 with Retry-After; nothing is sent to another replica by itself, since what one died of may be the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import structlog
from prerope.server.api.errors import error_response
from prerope.server.api.fairness import BODIES, BodyLimit, BodyRoom
from prerope.server.api.keys import METRICS_PATH
from prerope.server.api.middleware import ClientTimeout
from prerope.server.api.replies import Replies
from prerope.server.errors import ClientGone, EngineUnavailable, RequestError
from prerope.server.log import configure_logging
from prerope.server.ray_app.call import Call
from prerope.server.ray_app.metrics import merged
from prerope.server.settings import Settings
from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.exceptions import RequestCancelledError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

log = structlog.get_logger(__name__)

METRICS_TIMEOUT_S = 5.0

ROUTING_S = 0.1
"""The router learns where a request went once it has been sent there, which takes milliseconds: many at once would all
go to the same replica. So the next one waits until then, and no longer than this for a replica that does not answer."""


class Entrance:
    """The ingress deployment. What serves HTTP is an object of its own, since Serve wants no `__call__` here."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        configure_logging(settings.log_level, settings.log_format)
        self._app = PassOn(replicas, settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI application; Serve asks for it by this name."""
        return self._app


class PassOn:
    """Requests to replicas, and their replies back: the ASGI application of the entrance."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._replicas = replicas
        self._routing = asyncio.Lock()
        self._bodies = BodyRoom(BODIES * settings.max_body_bytes)
        limited, in_pieces = BodyLimit(self._pass_on, settings.max_body_bytes), Replies(self._bodies.rest).in_pieces
        self._in_time = ClientTimeout(limited, settings.client_timeout_s, in_pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._in_time(scope, receive, send_noted)
        except RequestError as error:
            if begun:
                raise
            await error_response(error)(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._bodies.body(Request(scope, receive)) as body:
                await self._ask(Call.of(scope, body), scope, receive, send)
        except ClientGone:
            log.debug("a client left within its body")

    async def _ask(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with AsyncExitStack() as stack:
                async with self._routing:
                    replies = self._replicas.options(stream=True).answer.remote(call)
                    await stack.enter_async_context(_ended_with_client(receive, replies))
                    await _sent(replies)
                async for messages in replies:
                    if scope["path"] == METRICS_PATH and messages[0].get("status") == 200:  # this client may see them
                        await Response(await self._metrics(), media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
                        return
                    for message in messages:
                        await send(message)
        except RequestCancelledError:
            log.debug("a client left")
        except RayActorError as error:
            log.warning("a replica was lost with a request", error=type(error).__name__)
            raise EngineUnavailable(
                "the replica that had this request is gone; send it again", code="replica_lost"
            ) from error

    async def _metrics(self) -> bytes:
        """The metrics of all replicas that answer in time."""
        found = self._replicas.broadcast("metrics")
        replies = await found.results_async(timeout_s=METRICS_TIMEOUT_S, return_exceptions=True)
        return merged([reply for reply in replies if not isinstance(reply, BaseException)])


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan, of something that has nothing to start."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _sent(replies: DeploymentResponseGenerator) -> None:
    """Wait until a replica has the request, for ROUTING_S at most. What goes wrong, who reads the replies hears."""
    sending = asyncio.ensure_future(replies._to_object_ref_gen())
    sending.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.wait([sending], timeout=ROUTING_S)


@asynccontextmanager
async def _ended_with_client(receive: Receive, replies: DeploymentResponseGenerator) -> AsyncIterator[None]:
    """A context in which the replica's work ends with the client: if it leaves, the replica need not go on."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        replies.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        replies.cancel()
