"""Performs the tasks of a soak against a server and says how each went.

What is checked of every reply: its status is one that the task allows; a refusal carries an error object, and a
Retry-After where it is a 429; a stream ends with [DONE], without an error event, and has a usage; a plain reply has
generated tokens. Connections are never reused, so that a socket that stays open on the server is a leak.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx

from bench.shared.servers import http_client
from bench.shared.streams import Completion, StreamFailed, read_completion
from bench.soak.plan import Task

RECEIVE_BUFFER, READ_BYTES = 4096, 256  # of slow readers
PATIENCE_S = 900.0
"""A request may take this long."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one task went. Times are seconds; `started` counts from when the client was made.

    Attributes:
        status: of the reply; 0 where none came.
        problem: what must not be; empty where all is well.
        aborted: the client went away before the end, as planned.
        ttft, gaps: of streams that ended, else None and empty.
    """

    kind: str
    started: float
    seconds: float
    status: int
    problem: str = ""
    aborted: bool = False
    ttft: float | None = None
    gaps: tuple[float, ...] = ()


@dataclass(slots=True)
class SoakClient:
    """One server's client; `num_open` requests are under way."""

    root: str
    key: str
    num_open: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    born: float = field(default_factory=time.perf_counter)

    async def perform(self, task: Task) -> None:
        """Do it and keep how it went. Never raises for what a server can do."""
        self.num_open += 1
        began = time.perf_counter()
        status, problem, aborted, stream = 0, "", False, None
        try:
            async with asyncio.timeout(PATIENCE_S if task.abort_after_s is None else task.abort_after_s):
                status, headers, chunks = await self._ask(task)
            stream = check(task, status, headers, chunks, began)
        except TimeoutError:
            aborted = task.abort_after_s is not None
            problem = "" if aborted else f"no end within {PATIENCE_S:g} s"
        except (httpx.HTTPError, OSError, StreamFailed, ValueError, KeyError) as error:
            problem = f"HTTP {status}, {type(error).__name__}: {error}"
        finally:
            self.num_open -= 1
        named = f"{task.detail or task.kind} at {task.path}: {problem}" if problem else ""
        ttft, gaps = (stream.ttft, tuple(stream.gaps)) if stream else (None, ())
        seconds = time.perf_counter() - began
        self.outcomes.append(Outcome(task.kind, began - self.born, seconds, status, named, aborted, ttft, gaps))

    async def _ask(self, task: Task) -> tuple[int, Mapping[str, str], list[tuple[float, bytes]]]:
        key = self.key if task.key is True else task.key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        content = task.body if isinstance(task.body, bytes) else json.dumps(task.body).encode()
        chunks: list[tuple[float, bytes]] = []
        # A slow reader has a small buffer, so that what it leaves unread waits at the server.
        small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)] if task.read_pause_s else None
        async with (
            http_client(self.root, socket_options=small) as http,
            http.stream(task.method, task.path, content=content, headers=headers) as reply,
        ):
            async for chunk in reply.aiter_raw(READ_BYTES if task.read_pause_s else None):
                chunks.append((time.perf_counter(), chunk))
                if task.read_pause_s:
                    await asyncio.sleep(task.read_pause_s)
            return reply.status_code, reply.headers, chunks


def check(
    task: Task, status: int, headers: Mapping[str, str], chunks: list[tuple[float, bytes]], began: float
) -> Completion | None:
    """What a stream brought and when; None for other replies.

    Raises:
        StreamFailed, ValueError, KeyError: the reply is not as it must be; messages repeat no prompt.
    """
    body = b"".join(chunk for _, chunk in chunks)
    if status not in task.statuses:
        allowed = " or ".join(map(str, sorted(task.statuses)))
        raise ValueError(f"expected {allowed}: {body[:300].decode(errors='replace')}")
    if status != httpx.codes.OK:
        error = json.loads(body)["error"]
        if not error["message"] or not error["type"]:
            raise ValueError("the error says nothing")
        if status == httpx.codes.TOO_MANY_REQUESTS and int(headers["retry-after"]) < 1:
            raise ValueError("Retry-After is not a positive number of seconds")
    elif task.streams:
        if not body.endswith(b"data: [DONE]\n\n"):
            raise StreamFailed("the stream ended without [DONE]")
        return read_completion(began, chunks)
    elif task.kind != "hostile" and json.loads(body)["usage"]["completion_tokens"] < 1:
        raise ValueError("no token was generated")
    return None
